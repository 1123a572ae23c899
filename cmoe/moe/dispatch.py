"""How tokens reach their experts: sort by expert, multiply each expert's rows, add up; or all experts on all tokens.

- `grouped`: one `F.grouped_mm` per linear map. Not for float64, and rows must be multiples of 16 bytes. The only sorted
  path that need not know on the host how many rows each expert has.
- `loop`: one product per expert. Takes everything; the reference.
- `bmm`: rows zero-padded to the fullest expert, one batched product.
- `dense`: every expert on every token, weighted 0 where it was not chosen: no sorting, nothing data-dependent.

For many tiny experts with few rows each `auto` has one more way, `gather`: see `gather.py`.

`auto` chooses from the cohort's own shape and row counts, so that what other cohorts do never changes the path of this
one: a cohort's rows are sorted, gathered and multiplied alike, bit for bit, whatever was added beside it. All operations
are deterministic on CPU; on CUDA `index_add_` is under `torch.use_deterministic_algorithms(True)`, and in any case for
K <= 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmoe.moe.gather import pays
from cmoe.moe.grouped import LOW, float32_is_faster
from cmoe.moe.processes import distributed
from cmoe.moe.view import ExpertView

if TYPE_CHECKING:
    from cmoe.moe.experts.base import Cohorts, Expert
    from cmoe.moe.routing import Routing

Load = list[int] | Tensor
Path = Literal["auto", "grouped", "loop", "bmm", "dense"]
PATHS: tuple[str, ...] = get_args(Path)


@dataclass(frozen=True)
class Block:
    """The rows of one cohort.

    Attributes:
        key: the cohort's.
        low, high: where its rows lie among all sorted ones.
        counts: rows of each of its experts; None where only the device knows.
        ends: where each expert's rows end, relative to `low`; None where `counts` are known.
    """

    key: str
    low: int
    high: int
    counts: list[int] | None
    ends: Tensor | None = None


class Sorted:
    """The assignments of a routing in the order of their experts.

    Args:
        routing: who works on which token.
        view: the layer's experts in column order.
        host: whether row counts may be read; without, the layer must have one cohort.
    """

    def __init__(self, routing: Routing, view: ExpertView, host: bool = True) -> None:
        ids_N = routing.ids.reshape(-1)
        self.k, self.view, self.device = routing.ids.shape[1], view, ids_N.device
        # assignments to nobody sort behind every expert
        columns_N = view.to_columns(ids_N, none=len(view))
        self.sorted_N, self.order_N = columns_N.sort(stable=True)
        ends_E = torch.searchsorted(self.sorted_N, torch.arange(len(view), device=self.device), right=True)
        self.token_N = self.order_N if self.k == 1 else self.order_N.div(self.k, rounding_mode="floor")
        self.ends: list[int] | None = ends_E.tolist() if host else None
        self._ends_E = ends_E

    @property
    def counts(self) -> list[int]:
        """Rows of each column, where the host knows them."""
        assert self.ends is not None
        return [end - start for start, end in zip([0, *self.ends], self.ends, strict=False)]

    @property
    def counts_E(self) -> Tensor:
        """Rows of each column."""
        return self._ends_E.diff(prepend=self._ends_E.new_zeros(1))

    def blocks(self, idle: bool) -> Iterator[Block]:
        """The cohorts that have rows, in order; with `idle` also those that have none.

        The last cohort comes even when nobody has any: an empty batch stays in the graph.
        """
        if self.ends is None:
            assert len(self.view.cohorts) == 1
            yield Block(next(iter(self.view.cohorts)), 0, len(self.order_N), None, self._ends_E.to(torch.int32))
            return
        first = 0
        starts, none_yet = [0, *self.ends], True
        for key, ids in self.view.cohorts.items():
            last = first + len(ids)
            low, high = starts[first], starts[last]
            if low < high or idle or (none_yet and last == len(self.view)):
                yield Block(key, low, high, [starts[e + 1] - starts[e] for e in range(first, last)])
                none_yet = False
            first = last


def dispatch(
    x_TD: Tensor, routing: Routing, view: ExpertView, cohorts: Cohorts, path: str, recompute: bool = False
) -> tuple[Tensor, Load]:
    """Send tokens to their experts and add up the weighted outputs.

    Args:
        x_TD: tokens, (T, ...): vectors, or whatever unit the experts work on.
        routing: who works on which token; tokens with no expert give 0.
        view: the layer's experts in column order.
        cohorts: the experts' weights.
        path: one of `PATHS`.
        recompute: keep no hidden units for the backward pass, compute them again (activation checkpointing).

    Returns:
        y_TO, and the number of rows of every column: a list, or (E,) where the host does not know.

    Raises:
        ValueError: `path` cannot run these experts.
    """
    if path == "dense" or (path == "auto" and _everybody(routing, view, cohorts)):
        return _dense(x_TD, routing, view, cohorts, recompute)
    sort = Sorted(routing, view, on_host(path, x_TD, cohorts))
    weights_N = routing.weights.reshape(-1)
    y_TO: Tensor | None = None
    for block, out_NO in outputs(x_TD, sort, cohorts, path, recompute):
        rows, tokens = sort.order_N[block.low : block.high], sort.token_N[block.low : block.high]
        weight_N = weights_N.index_select(0, rows).to(out_NO.dtype)
        out_NO = out_NO * weight_N.view(-1, *[1] * (out_NO.dim() - 1))
        if y_TO is None:
            y_TO = out_NO.new_zeros(x_TD.shape[0], *out_NO.shape[1:])
        y_TO.index_add_(0, tokens, out_NO)
    assert y_TO is not None, "a layer has at least one cohort"
    return y_TO, sort.counts_E if sort.ends is None else sort.counts


def outputs(
    x_TD: Tensor, sort: Sorted, cohorts: Cohorts, path: str, recompute: bool = False
) -> Iterator[tuple[Block, Tensor]]:
    """Each cohort's block with what its experts make of their tokens' rows, (N, O), not weighted yet."""
    for block in sort.blocks(idle=distributed()):
        rows = x_TD.index_select(0, sort.token_N[block.low : block.high])
        yield block, maybe_again(recompute, cohorts[block.key].work, rows, block, path)


def each_assignment(
    x_TD: Tensor, routing: Routing, view: ExpertView, cohorts: Cohorts, path: str, recompute: bool = False
) -> Tensor:
    """What each token's experts make of it, one by one, (T, K, O) in the order of the routing's ids; 0 for nobody."""
    sort = Sorted(routing, view)
    parts = list(outputs(x_TD, sort, cohorts, "loop" if path == "dense" else path, recompute))
    out_NO = torch.cat([out for _, out in parts])
    where_N = torch.cat([sort.order_N[block.low : block.high] for block, _ in parts])
    flat = out_NO.new_zeros(routing.ids.numel(), *out_NO.shape[1:]).index_copy(0, where_N, out_NO)
    return flat.view(*routing.ids.shape, *out_NO.shape[1:])


def _dense(x_TD: Tensor, routing: Routing, view: ExpertView, cohorts: Cohorts, recompute: bool) -> tuple[Tensor, Load]:
    tokens = x_TD.shape[0]
    columns_TK = view.to_columns(routing.ids, none=len(view))
    weights_TE = routing.weights.new_zeros(tokens, len(view) + 1).scatter_add(1, columns_TK, routing.weights)
    chosen_E = torch.zeros(len(view) + 1, dtype=torch.int64, device=x_TD.device)
    chosen_E = chosen_E.scatter_add(0, columns_TK.reshape(-1), torch.ones_like(columns_TK).reshape(-1))[:-1]
    if routing.ids.shape[1] < len(view):  # a token of nobody may be anything: padding, infinity
        nobody_T = (columns_TK == len(view)).all(1)
        x_TD = torch.where(nobody_T.view(-1, *[1] * (x_TD.dim() - 1)), 0.0, x_TD)
    y_TO: Tensor | None = None
    first, seen = 0, set(routing.columns or view.ids)
    for key, ids in view.cohorts.items():
        own_ET = weights_TE[:, first : first + len(ids)].t()
        first += len(ids)
        if seen.isdisjoint(ids):
            continue
        out_ETO = maybe_again(recompute, cohorts[key].every, x_TD)
        y = torch.einsum("et,et...->t...", own_ET.to(out_ETO.dtype), out_ETO)
        y_TO = y if y_TO is None else y_TO + y
    assert y_TO is not None, "a layer has at least one cohort"
    known = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    return y_TO, chosen_E.tolist() if known else chosen_E


def _everybody(routing: Routing, view: ExpertView, cohorts: Cohorts) -> bool:
    """Whether each token goes to each visible expert, whole cohorts of them, so that there is nothing to sort.

    What is not visible takes no part in the answer: it must not change how the others are computed.
    """
    k = routing.ids.shape[1]
    if k == 1 or k < len(routing.columns) or not routing.columns or torch.compiler.is_compiling():
        return False
    seen = set(routing.columns)
    if sum(len(ids) for ids in view.cohorts.values() if not seen.isdisjoint(ids)) > k:
        return False
    low = routing.ids.device.type == "cpu" and any(p.dtype in LOW for c in cohorts.values() for p in c.parameters())
    return not low and bool((routing.ids >= 0).all())


def on_host(path: str, x_TD: Tensor, cohorts: Cohorts) -> bool:
    """Whether to wait for the row counts: always, but where one cohort's grouped products can do without."""
    if len(cohorts) > 1 or path not in ("auto", "grouped"):
        return True
    if x_TD.device.type == "cpu" and not torch.compiler.is_compiling():
        return True
    (cohort,) = cohorts.values()
    return grouped_refusal(cohort, working_dtype(x_TD)) is not None


def maybe_again(recompute: bool, run: Callable[..., Tensor], *args: object) -> Tensor:
    """`run(*args)`; with `recompute` its intermediate results are computed again for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(run, *args, use_reentrant=False)
    return run(*args)


# -- which way to multiply ------------------------------------------------------------------------------------------


def working_dtype(x: Tensor) -> torch.dtype:
    """The type that products are computed in: autocast's, or the rows' own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_refusal(expert: Expert, dtype: torch.dtype) -> str | None:
    """Why `grouped` cannot run this cohort in this type; None when it can."""
    if "grouped" not in expert.paths:
        return f"cannot run experts of kind {type(expert).__name__}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    widths = {size for p in expert.stacked() if p is not None and p.dim() == 3 for size in p.shape[1:]}
    uneven = sorted(size for size in widths if size * dtype.itemsize % 16)
    return f"needs dimensions that are multiples of 16 bytes, not {uneven} of {dtype}" if uneven else None


def choose(expert: Expert, counts: Sequence[int] | None, x_ND: Tensor, path: str) -> str:
    """The way to multiply for one cohort; without `counts` only `grouped` will do.

    Raises:
        ValueError: `grouped` is asked for and cannot do it.
    """
    if path not in ("grouped", "auto"):
        return path
    if path == "auto" and counts is not None and pays(expert, counts, x_ND, working_dtype(x_ND)):
        return "gather"
    refusal = grouped_refusal(expert, working_dtype(x_ND))
    if path == "grouped":
        if refusal:
            raise ValueError(f"dispatch: grouped {refusal}; use 'auto', 'loop' or 'bmm'")
        return path
    return path_for(counts, x_ND, refusal is None)


def path_for(counts: Sequence[int] | None, x_ND: Tensor, can_group: bool) -> str:
    """What `auto` is for a cohort with these row counts."""
    if counts is None:
        return "grouped"
    if x_ND.device.type != "cpu":
        return "grouped" if can_group else "bmm"
    dtype = working_dtype(x_ND)
    if dtype in LOW and float32_is_faster("cpu"):
        return "loop"
    rows, n, most = x_ND.shape[0], len(counts), max(counts)
    if n * most <= 1.02 * rows:  # balanced: nothing to pad
        return "bmm"
    return "grouped" if can_group else "loop"  # on CPU both loop, one of them in C++
