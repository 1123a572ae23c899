"""The base of expert kinds: a cohort of experts with stacked weights, described once and run in any of the ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, ValuesView
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe.dispatch import RUNNERS, choose, dense_linear

LinearMap = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Init = Literal["uniform", "xavier", "normal"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class Expert(nn.Module):
    """A cohort: `n` experts of one kind that were added together; every parameter has one row per expert.

    A kind defines `stacked` and `compute`; `compute` is written once with an abstract linear map and runs on one
    expert, on padded blocks and on sorted rows alike.

    Args:
        n: experts in the cohort.
        dim: input dimension D.
        hidden: hidden units H of one expert; None lets the kind choose.
        out_dim: output dimension O.
    """

    supplied: ClassVar[tuple[str, ...]] = ("n", "dim", "hidden", "out_dim")

    def __init__(self, n: int, dim: int, hidden: int | None, out_dim: int) -> None:
        super().__init__()
        self.n, self.dim, self.hidden, self.out_dim = n, dim, hidden, out_dim

    def stacked(self) -> tuple[Tensor | None, ...]:
        """The parameters in the order that `compute` takes them: weights (E, I, O), vectors (E, O), or None."""
        raise NotImplementedError(f"{type(self).__name__} must define stacked()")

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        """The expert as a formula of x (..., D) and its parameters; `linear(x, weight, bias)` does the products."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(x, linear, *parameters)")

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
        busy = [e for e, count in enumerate(counts) if count]
        if self.n == 1 or (len(busy) == 1 and path == "auto"):
            return self.single(x_ND, busy[0] if busy else 0)
        path = choose(self, counts, x_ND, path)
        return RUNNERS[path if busy else "loop"](self, x_ND, counts)

    def single(self, x_ND: Tensor, row: int) -> Tensor:
        """All rows through one expert: a dense layer."""
        if self.n == 1:
            # squeeze has a view as its backward, select fills a stack with zeros; a bias (1, O) broadcasts as it is
            parameters = [p.squeeze(0) if p is not None and p.dim() > 2 else p for p in self.stacked()]
        else:
            parameters = [p if p is None else p.select(0, row) for p in self.stacked()]
        return self.compute(x_ND, dense_linear, *parameters)

    def flops_per_token(self) -> int:
        """Floating point operations of one expert on one token, matrix products only."""
        return sum(2 * p.shape[1] * p.shape[2] for p in self.stacked() if p is not None and p.dim() == 3)

    def extra_repr(self) -> str:
        return f"n={self.n}, dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}"


class Cohorts(nn.ModuleDict):
    """Cohort key -> cohort, with the types of its values."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Expert: ...

        def values(self) -> ValuesView[Expert]: ...


@torch.no_grad()
def init_linear(weight: Tensor, bias: Tensor | None, init: str) -> None:
    """Initial values of stacked linear maps, each expert as a layer of its own: weight (E, I, O), bias (E, O).

    'uniform' is `nn.Linear`'s own (U(±1/√I) for both), 'xavier' Glorot's uniform with zero bias, 'normal' N(0, 0.02)
    with zero bias.
    """
    fan_in, fan_out = weight.shape[1:]
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
