"""Linear maps of rows that are sorted by expert, with a backward pass of its own.

Autograd over one product per expert copies every weight's gradient once more (the backward pass of `unbind` is a `stack`)
and needs four operations per expert where three do; here products are written straight to where they belong. Two ways:
`grouped` is one `F.grouped_mm` (a loop in C++ on CPU, one kernel on GPU), `loop` one `mm` per expert, for every type and
alignment. On a CPU without instructions for bfloat16, products of low precision are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.moe.spare import spare_like

LOW = (torch.bfloat16, torch.float16)


class Rows:
    """Which rows belong to which expert: consecutive blocks, in order.

    Args:
        counts: rows of each expert; None where only the device knows them.
        ends: (E,) int32, where each expert's rows end; made from `counts` when not given.
        total: rows in all; those behind the last end belong to nobody and give 0.
        device: of the rows.
        way: 'grouped' or 'loop'.
    """

    def __init__(
        self, counts: Sequence[int] | None, ends: Tensor | None, total: int, device: torch.device, way: str
    ) -> None:
        self._counts, self._ends, self.total, self.device, self.way = counts, ends, total, device, way
        self._partial = counts is None  # there may be rows of nobody
        self._expert_N: Tensor | None = (
            None  # what is made when first asked for; torch.compile knows no cached_property
        )

    @property
    def counts(self) -> list[int]:
        """Rows of each expert; waits for the device where only it knows them."""
        if self._counts is None:
            assert self._ends is not None
            ends = self._ends.tolist()
            self._counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return list(self._counts)

    @property
    def ends(self) -> Tensor:
        """Where each expert's rows end."""
        if self._ends is None:
            assert self._counts is not None
            self._ends = torch.tensor(list(accumulate(self._counts)), dtype=torch.int32, device=self.device)
        return self._ends

    @property
    def expert_N(self) -> Tensor:
        """Each row's expert; rows of nobody have the last one's."""
        if self._expert_N is None:
            self._expert_N = self._find_experts()
        return self._expert_N

    def _find_experts(self) -> Tensor:
        if self._counts is not None:
            numbers = torch.arange(len(self._counts), device=self.device)
            counts_E = torch.tensor(self._counts, dtype=torch.int64, device=self.device)
            return torch.repeat_interleave(numbers, counts_E, output_size=self.total)
        rows = torch.arange(self.total, device=self.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, rows, right=True).clamp(max=len(self.ends) - 1)

    def times(self, places: int) -> Rows:
        """The same where each row stands for so many."""
        if places == 1:
            return self
        counts = None if self._counts is None else [places * count for count in self._counts]
        ends = None if self._ends is None else places * self._ends
        return Rows(counts, ends, places * self.total, self.device, self.way)

    def clean(self, y_NO: Tensor) -> Tensor:
        """Zeros in the rows behind the last end, which `grouped_mm` leaves as they were."""
        if not self._partial:
            return y_NO
        nobody_N = torch.arange(self.total, device=self.device) >= self.ends[-1]
        return torch.where(nobody_N.unsqueeze(1), 0.0, y_NO)


@cache
def float32_is_faster(device: str) -> bool:
    """Whether products of low precision are better computed in float32: a CPU without instructions for them."""
    return device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def grouped_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, rows: Rows) -> Tensor:
    """Each row times the weight of its expert, plus its bias, (N, O)."""
    return _GroupedLinear.apply(x_NI, weight_EIO, bias_EO, rows)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        y = _products(x, weight, rows)
        if bias is not None:
            y.add_(bias.index_select(0, rows.expert_N))
        return rows.clean(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, rows = inputs
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.bias = rows, bias is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, weight = ctx.saved_tensors
        rows, (need_x, need_weight, need_bias, _) = ctx.rows, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: operations that have gradients themselves
            return _differentiable(g, x, weight, rows, ctx.bias)
        g = rows.clean(g)
        g_x = rows.clean(_products(g, weight.transpose(1, 2), rows)) if need_x else None
        g_weight = _outer(x, g, rows, weight) if need_weight else None
        g_bias = None
        if ctx.bias and need_bias:
            low = g.dtype in LOW
            total = g.new_zeros(weight.shape[0], g.shape[1], dtype=torch.float32 if low else g.dtype)
            g_bias = total.index_add_(0, rows.expert_N, g.float() if low else g).to(g.dtype)
        return g_x, g_weight, g_bias, None


def _products(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    if rows.way == "grouped":
        return F.grouped_mm(x, weight, offs=rows.ends)
    low = x.dtype in LOW and float32_is_faster(x.device.type)
    y = x.new_empty(x.shape[0], weight.shape[2], dtype=torch.float32 if low else x.dtype)
    parts, outs, weights = (x.float() if low else x).split(rows.counts), y.split(rows.counts), weight.unbind(0)
    for e, count in enumerate(rows.counts):
        if count:
            torch.mm(parts[e], weights[e].float() if low else weights[e], out=outs[e])
    return y.to(x.dtype)


def _outer(x: Tensor, g: Tensor, rows: Rows, weight: Tensor) -> Tensor:
    """Each expert's xᵀ g, the gradient of its weight."""
    out = spare_like(weight) if weight.dtype == x.dtype else None
    if rows.way == "grouped" and out is None:
        return F.grouped_mm(x.t(), g, offs=rows.ends)
    low = x.dtype in LOW and float32_is_faster(x.device.type)
    if out is None:
        out = x.new_empty(len(rows.counts), x.shape[1], g.shape[1])
    parts, grads, outs = (
        (x.float() if low else x).t().split(rows.counts, 1),
        (g.float() if low else g).split(rows.counts),
        out.unbind(0),
    )
    for e, count in enumerate(rows.counts):
        if not count:
            outs[e].zero_()
        elif low:
            outs[e].copy_(parts[e] @ grads[e])
        else:
            torch.mm(parts[e], grads[e], out=outs[e])
    return out


def _differentiable(g: Tensor, x: Tensor, weight: Tensor, rows: Rows, bias: bool) -> tuple[Tensor | None, ...]:
    counts = rows.counts
    left = rows.total - sum(counts)
    parts, grads = x.split([*counts, left]), g.split([*counts, left])
    used = range(len(counts))
    g_x = torch.cat([*(grads[e] @ weight[e].t() for e in used), torch.zeros_like(parts[-1])])
    g_weight = torch.stack([parts[e].t() @ grads[e] for e in used])
    return g_x, g_weight, torch.stack([grads[e].sum(0) for e in used]) if bias else None, None
