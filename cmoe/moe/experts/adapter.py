"""Bottleneck adapters as experts (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from typing import Literal

import torch

from cmoe.config.types import Fraction, PositiveInt
from cmoe.moe.experts.ffn import FFN


class Adapter(FFN):
    """Bottleneck of two linear maps with an activation between them, added to a network that stays (`base: frozen`).

    The second map is zero at the start, so that a new expert changes nothing. It stands beside the network that it adds
    to (the parallel adapter of He et al. 2021, https://arxiv.org/abs/2110.04366). Parameters as in `FFN`; `hidden` is not
    used.

    Options:
        bottleneck: hidden units of one expert; experts of different sizes may stand in one layer (`more`).
        activation: 'gelu', 'relu', 'silu', 'tanh', or gated 'swiglu'.
        dropout: share of hidden units that is dropped while training.
        init: of the first map: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).
        bias: whether the linear maps have a bias.
    """

    widens = False  # its size is an option

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        bottleneck: PositiveInt = 64,
        activation: Literal["gelu", "relu", "silu", "tanh", "swiglu"] = "gelu",
        dropout: Fraction = 0.0,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
        bias: bool = True,
    ) -> None:
        if bottleneck < 1:
            raise ValueError(f"adapter: bottleneck: expected at least 1, got {bottleneck}")
        super().__init__(n, dim, bottleneck, out_dim, activation, dropout, init, bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.zero_output()
