"""The base of expert kinds: a cohort of experts with stacked weights, described once and run in any of the ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, ValuesView
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe.dispatch import Block, choose, working_dtype
from cmoe.moe.gather import gathered_linear
from cmoe.moe.grouped import Rows, grouped_linear

LinearMap = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Init = Literal["uniform", "xavier", "normal"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "none": lambda x: x,
}


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One expert: x (N, ..., I), weight (I, O), bias (O,) or (1, O)."""
    if x.dim() > 2:
        return dense_linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def batched_linear(x_ECI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Padded experts: x (E, C, ..., I), weight (E, I, O), bias (E, O)."""
    if x_ECI.dim() > 3:
        return batched_linear(x_ECI.flatten(1, -2), weight, bias).unflatten(1, x_ECI.shape[1:-1])
    return torch.bmm(x_ECI, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x_ECI, weight)


class Expert(nn.Module):
    """A cohort: `n` experts of one kind that were added together; every parameter has one row per expert.

    A kind defines `stacked` and `compute`; `compute` is written once with an abstract linear map and runs on one
    expert, on padded blocks and on sorted rows alike. A kind that works on tokens works on every place of a larger unit.

    Attributes:
        inner: dimensions of the unit it needs, before D: 0 a token, 1 a sequence (L, D), 2 a map (H, W, D).
        widens: whether two side by side, added up, are one of twice the hidden units.
        paths: ways of `cmoe.moe.dispatch` that can run it.

    Args:
        n: experts in the cohort.
        dim: input dimension D.
        hidden: hidden units H of one expert; None lets the kind choose.
        out_dim: output dimension O.
    """

    supplied: ClassVar[tuple[str, ...]] = ("n", "dim", "hidden", "out_dim")
    inner: ClassVar[int] = 0
    widens: bool = False
    paths: ClassVar[tuple[str, ...]] = ("grouped", "loop", "bmm", "dense")

    def __init__(self, n: int, dim: int, hidden: int | None, out_dim: int) -> None:
        super().__init__()
        self.n, self.dim, self.hidden, self.out_dim = n, dim, hidden, out_dim

    def stacked(self) -> tuple[Tensor | None, ...]:
        """The parameters in the order that `compute` takes them: weights (E, I, O), vectors (E, O), or None."""
        raise NotImplementedError(f"{type(self).__name__} must define stacked()")

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        """The expert as a formula of x (..., D) and its parameters; `linear(x, weight, bias)` does the products."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(x, linear, *parameters)")

    def units(self) -> dict[str, tuple[int, int]]:
        """Where hidden units lie, for those kinds whose function is the same in any order of them.

        Parameter name -> the axis of one expert's row along which they lie, and how many times one after the other (2 for
        a gate beside its values). Without any, experts are merged as their units stand.
        """
        return {}

    def reset_parameters(self) -> None:
        """Draw initial values."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters()")

    def zero_output(self) -> None:
        """Make every expert give 0 and still learn.

        Raises:
            ValueError: this kind cannot do that.
        """
        raise ValueError(f"init: zero is not possible for experts of kind {type(self).__name__}")

    def forward(self, x_ND: Tensor, counts: Sequence[int], path: str = "auto") -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e, through their experts.

        Raises:
            ValueError: `path` cannot run this cohort.
        """
        return self.work(x_ND, Block("", 0, len(x_ND), list(counts)), path)

    def work(self, x_ND: Tensor, block: Block, path: str) -> Tensor:
        """The rows of a block through their experts; raises as `forward`."""
        counts = block.counts
        if counts is not None:
            busy = [e for e, count in enumerate(counts) if count]
            if self.n == 1 or (len(busy) == 1 and path == "auto"):
                return self.single(x_ND, busy[0] if busy else 0)
            path = choose(self, counts, x_ND, path) if busy else "loop"
            if path == "bmm":
                return self.padded(x_ND, counts)
        else:
            path = choose(self, None, x_ND, path)
        return self.on_rows(x_ND, Rows(counts, block.ends, x_ND.shape[0], x_ND.device, path), self.stacked())

    def on_rows(self, x_ND: Tensor, rows: Rows, stacked: Sequence[Tensor | None]) -> Tensor:
        """Rows that are sorted by expert, through parameters like this cohort's."""
        dtype = working_dtype(x_ND)  # neither grouped_mm nor a backward pass of our own is cast by autocast

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            if rows.way == "gather":
                return gathered_linear(x.to(dtype), weight, bias, rows.expert_N)
            if x.dim() == 2:
                return grouped_linear(x.to(dtype), weight, bias, rows)
            places = rows.times(math.prod(x.shape[1:-1]))
            return grouped_linear(x.flatten(0, -2).to(dtype), weight, bias, places).unflatten(0, x.shape[:-1])

        return self.compute(x_ND, linear, *stacked)

    def padded(self, x_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Sorted rows by one batched product over blocks of the fullest expert's size."""
        n, width = len(counts), max(counts)
        if min(counts) == width:  # balanced: nothing to pad
            return self.blocks(x_ND.unflatten(0, (n, width))).flatten(0, 1)
        starts = [0, *accumulate(counts)]
        shift = torch.tensor([e * width - starts[e] for e in range(n)], dtype=torch.int64, device=x_ND.device)
        rows = Rows(counts, None, x_ND.shape[0], x_ND.device, "bmm")
        slots_N = torch.arange(x_ND.shape[0], device=x_ND.device) + shift.index_select(0, rows.expert_N)
        padded = x_ND.new_zeros(n * width, *x_ND.shape[1:]).index_copy(0, slots_N, x_ND).unflatten(0, (n, width))
        return self.blocks(padded).flatten(0, 1).index_select(0, slots_N)

    def every(self, x_TD: Tensor) -> Tensor:
        """Every token through every expert, (E, T, O)."""
        if self.n == 1:
            return self.single(x_TD, 0).unsqueeze(0)
        return self.compute(x_TD.expand(self.n, *x_TD.shape), batched_linear, *self.stacked())

    def blocks(self, x_END: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """As many rows for each expert (or for those in `rows`), (E, N, D) to (E, N, O)."""
        stacked = self.stacked()
        if rows is not None:
            index = torch.tensor(rows, dtype=torch.int64, device=x_END.device)
            stacked = tuple(None if p is None else p.index_select(0, index) for p in stacked)
        return self.compute(x_END, batched_linear, *stacked)

    def single(self, x_ND: Tensor, row: int) -> Tensor:
        """All rows through one expert: a dense layer."""
        if self.n == 1:
            # squeeze has a view as its backward, select fills a stack with zeros; a bias (1, O) broadcasts as it is
            parameters = [p.squeeze(0) if p is not None and p.dim() > 2 else p for p in self.stacked()]
        else:
            parameters = [p if p is None else p.select(0, row) for p in self.stacked()]
        return self.compute(x_ND, dense_linear, *parameters)

    def flops_per_token(self) -> int:
        """Floating point operations of one expert on one token or place of a unit, matrix products only."""
        return sum(2 * p.shape[1] * p.shape[2] for p in self.stacked() if p is not None and p.dim() == 3)

    def extra_repr(self) -> str:
        return f"n={self.n}, dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}"


class Cohorts(nn.ModuleDict):
    """Cohort key -> cohort, with the types of its values."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Expert: ...

        def values(self) -> ValuesView[Expert]: ...


@torch.no_grad()
def init_linear(
    weight: Tensor, bias: Tensor | None, init: str, fan_in: int | None = None, fan_out: int | None = None
) -> None:
    """Initial values of stacked linear maps, each expert as a layer of its own: weight (E, I, O), bias (E, O).

    'uniform' is `nn.Linear`'s own (U(±1/√I) for both), 'xavier' Glorot's uniform with zero bias, 'normal' N(0, 0.02)
    with zero bias. For other shapes say the inputs and outputs of a unit.
    """
    fan_in = weight.shape[1] if fan_in is None else fan_in
    fan_out = weight.shape[2] if fan_out is None else fan_out
    if init == "uniform":
        bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
        weight.uniform_(-bound, bound)
        if bias is not None:
            bias.uniform_(-bound, bound)
        return
    if init == "xavier":
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        weight.uniform_(-bound, bound)
    elif init == "normal":
        weight.normal_(0.0, 0.02)
    else:
        raise ValueError(f"init: expected 'uniform', 'xavier' or 'normal', got {init!r}")
    if bias is not None:
        bias.zero_()
