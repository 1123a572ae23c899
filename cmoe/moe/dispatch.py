"""How tokens reach their experts: sort by expert, then one of three ways to multiply.

- `grouped`: one `F.grouped_mm` per linear map. Not for float64, and rows must be multiples of 16 bytes.
- `loop`: one product per expert over `unbind` (indexing a stacked parameter per expert would make the backward pass
  quadratic in the number of experts). Takes everything; the reference.
- `bmm`: rows zero-padded to the fullest expert, one batched product.

`auto` chooses from the cohort's own shape and row counts, so that what other cohorts do never changes the path of this
one: a cohort's rows are sorted, gathered and multiplied alike, bit for bit, whatever was added beside it. All operations
are deterministic on CPU; on CUDA `index_add_` is under `torch.use_deterministic_algorithms(True)`, and in any case for
K <= 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.moe.view import NONE, ExpertView

if TYPE_CHECKING:
    from cmoe.moe.experts.base import Cohorts, Expert
    from cmoe.moe.routing import Routing

Path = Literal["auto", "grouped", "loop", "bmm"]
PATHS: tuple[str, ...] = get_args(Path)


def dispatch(
    x_TD: Tensor, routing: Routing, view: ExpertView, cohorts: Cohorts, path: str
) -> tuple[Tensor, dict[int, int]]:
    """Send tokens to their experts and add up the weighted outputs.

    Args:
        x_TD: tokens.
        routing: who works on which token; tokens with no expert give 0.
        view: the layer's experts in column order.
        cohorts: the experts' weights.
        path: one of `PATHS`.

    Returns:
        y_TO, and the number of rows of every expert that got any.
    """
    k = routing.ids.shape[1]
    ids_N = routing.ids.reshape(-1)
    if view.ascending:
        # -1 sorts before every expert, so its rows lie before the first start
        sorted_N, order_N = ids_N.sort(stable=True)
        starts = torch.searchsorted(sorted_N, view.ids_E(ids_N.device)).tolist()
    else:
        columns_N = view.to_columns(ids_N, none=NONE)
        sorted_N, order_N = columns_N.sort(stable=True)
        starts = torch.searchsorted(sorted_N, torch.arange(len(view), device=ids_N.device)).tolist()
    starts.append(ids_N.numel())
    token_N = order_N if k == 1 else order_N.div(k, rounding_mode="floor")
    weights_N = routing.weights.reshape(-1)

    y_TO: Tensor | None = None
    used: dict[int, int] = {}
    first = 0
    for key, ids in view.cohorts.items():
        last = first + len(ids)
        counts = [starts[e + 1] - starts[e] for e in range(first, last)]
        low, high = starts[first], starts[last]
        first = last
        if low == high and (y_TO is not None or last < len(view)):
            continue  # nobody here; the last cohort keeps an all-empty batch in the graph
        used.update((expert, count) for expert, count in zip(ids, counts, strict=True) if count)
        rows = order_N[low:high]
        tokens = token_N[low:high]
        out_NO = cohorts[key](x_TD.index_select(0, tokens), counts, path)
        out_NO = out_NO * weights_N.index_select(0, rows).to(out_NO.dtype).unsqueeze(1)
        if y_TO is None:
            y_TO = out_NO.new_zeros(x_TD.shape[0], out_NO.shape[1])
        y_TO.index_add_(0, tokens, out_NO)
    assert y_TO is not None, "a layer has at least one cohort"
    return y_TO, used


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One expert: x (N, I), weight (I, O), bias (O,) or (1, O)."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def batched_linear(x_ECI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Padded experts: x (E, C, I), weight (E, I, O), bias (E, O)."""
    return torch.bmm(x_ECI, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x_ECI, weight)


def run_loop(expert: Expert, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """Sorted rows through their experts, one after the other."""
    unbound = [None if p is None else p.unbind(0) for p in expert.stacked()]
    outputs = []
    for e, rows in enumerate(x_ND.split(list(counts))):
        if counts[e] or (e == 0 and not any(counts)):  # an empty batch still has its shape and its graph
            outputs.append(expert.compute(rows, dense_linear, *(None if p is None else p[e] for p in unbound)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def run_grouped(expert: Expert, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """Sorted rows through their experts by grouped products."""
    device = x_ND.device
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
    expert_N = _expert_of_rows(counts, device)
    # grouped_mm is not among the operations that autocast casts
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x_ND.dtype

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(x.to(dtype), weight.to(dtype), offs=ends)
        return y if bias is None else y + bias.to(dtype).index_select(0, expert_N)

    return expert.compute(x_ND, linear, *expert.stacked())


def run_bmm(expert: Expert, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """Sorted rows through their experts by one batched product over padded blocks."""
    n, width = len(counts), max(counts)
    if min(counts) == width:  # balanced: nothing to pad
        blocks = expert.compute(x_ND.view(n, width, x_ND.shape[1]), batched_linear, *expert.stacked())
        return blocks.reshape(n * width, blocks.shape[2])
    starts = [0, *accumulate(counts)]
    shift = torch.tensor([e * width - starts[e] for e in range(n)], dtype=torch.int64, device=x_ND.device)
    slots_N = torch.arange(x_ND.shape[0], device=x_ND.device) + shift.index_select(
        0, _expert_of_rows(counts, x_ND.device)
    )
    padded = x_ND.new_zeros(n * width, x_ND.shape[1]).index_copy(0, slots_N, x_ND).view(n, width, x_ND.shape[1])
    blocks = expert.compute(padded, batched_linear, *expert.stacked())
    return blocks.reshape(n * width, blocks.shape[2]).index_select(0, slots_N)


def _expert_of_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    counts_E = torch.tensor(counts, dtype=torch.int64, device=device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts_E, output_size=sum(counts))


def grouped_refusal(expert: Expert, dtype: torch.dtype) -> str | None:
    """Why `grouped` cannot run this cohort in this type; None when it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    widths = {size for p in expert.stacked() if p is not None and p.dim() == 3 for size in p.shape[1:]}
    uneven = sorted(size for size in widths if size * dtype.itemsize % 16)
    return f"needs dimensions that are multiples of 16 bytes, not {uneven} of {dtype}" if uneven else None


RUNNERS = {"loop": run_loop, "grouped": run_grouped, "bmm": run_bmm}


def choose(expert: Expert, counts: Sequence[int], x_ND: Tensor, path: str) -> str:
    """The way to multiply for one cohort.

    Raises:
        ValueError: `grouped` is asked for and cannot do it.
    """
    if path in ("grouped", "auto"):
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        refusal = grouped_refusal(expert, dtype)
        if path == "grouped":
            if refusal:
                raise ValueError(f"dispatch: grouped {refusal}; use 'auto', 'loop' or 'bmm'")
            return path
        return _auto(counts, x_ND, refusal is None)
    return path


def _auto(counts: Sequence[int], x_ND: Tensor, can_group: bool) -> str:
    # From medians of forward + backward over twelve shapes on one thread of an AMD EPYC: many rows per expert
    # fill a product each; few do better together; bfloat16 is fastest in batched products.
    rows, n = x_ND.shape[0], len(counts)
    if x_ND.device.type != "cpu":
        return "grouped" if can_group else "bmm"
    low = x_ND.dtype in (torch.bfloat16, torch.float16)
    if rows >= (1024 if low else 256) * n:
        return "loop"
    snug = n * max(counts) <= (4 if low else 2) * rows  # how much padding is worth it
    if can_group and not (low and snug):
        return "grouped"
    return "bmm" if snug else "loop"
