"""Linear experts: what a plain hidden layer of a multilayer perceptron becomes when it has experts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Fraction
from cmoe.moe.experts.base import ACTIVATIONS, Expert, LinearMap, init_linear


class Linear(Expert):
    """Linear map with an activation after it: a hidden layer whose output may have another size than its input.

    Parameters: `w` (E, D, O), `b` (E, O). `hidden` is not used.

    Options:
        activation: 'relu', 'gelu', 'silu', 'tanh' or 'none'.
        dropout: share of outputs that is dropped while training.
        init: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).
        bias: whether the linear map has a bias.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "relu",
        dropout: Fraction = 0.0,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
        bias: bool = True,
    ) -> None:
        super().__init__(n, dim, None, out_dim)
        if activation not in ACTIVATIONS:
            raise ValueError(f"linear: activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.dropout, self.init = activation, dropout, init
        self.w = nn.Parameter(torch.zeros(n, dim, out_dim))
        self.b = nn.Parameter(torch.zeros(n, out_dim)) if bias else None

    def stacked(self) -> tuple[Tensor | None, ...]:
        return self.w, self.b

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        w, b = parameters
        assert w is not None
        y = ACTIVATIONS[self.activation](linear(x, w, b))
        return F.dropout(y, self.dropout) if self.dropout and self.training else y

    def reset_parameters(self) -> None:
        init_linear(self.w, self.b, self.init)

    @torch.no_grad()
    def zero_output(self) -> None:
        if self.activation == "relu":  # its gradient at 0 is 0: such an expert would never learn
            raise ValueError("init: zero is not possible for experts of kind linear with activation: relu")
        self.w.zero_()
        if self.b is not None:
            self.b.zero_()
