"""Low-rank experts (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Fraction, Positive, PositiveInt
from cmoe.moe.experts.base import Expert, LinearMap, init_linear


class LoRA(Expert):
    """Low-rank linear map, x A B · alpha / rank: what an expert adds to a network that stays (`base: frozen`).

    Parameters: `a` (E, D, R), `b` (E, R, O), zero at the start, so that a new expert changes nothing. `hidden` is not
    used.

    Options:
        rank: R; experts of different ranks may stand in one layer (`more`).
        alpha: the output is scaled by alpha / rank, so that another rank needs no other learning rate.
        dropout: share of inputs that is dropped while training.
        init: of `a`: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).
    """

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        rank: PositiveInt = 8,
        alpha: Positive = 16.0,
        dropout: Fraction = 0.0,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
    ) -> None:
        super().__init__(n, dim, rank, out_dim)
        if rank < 1:
            raise ValueError(f"lora: rank: expected at least 1, got {rank}")
        self.scale, self.dropout, self.init = alpha / rank, dropout, init
        self.a = nn.Parameter(torch.zeros(n, dim, rank))
        self.b = nn.Parameter(torch.zeros(n, rank, out_dim))

    def stacked(self) -> tuple[Tensor | None, ...]:
        return self.a, self.b

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        a, b = parameters
        assert a is not None
        assert b is not None
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.scale * linear(linear(x, a, None), b, None)

    def units(self) -> dict[str, tuple[int, int]]:
        return {"a": (1, 1), "b": (0, 1)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_linear(self.a, None, self.init)
        self.b.zero_()

    @torch.no_grad()
    def zero_output(self) -> None:
        self.b.zero_()
