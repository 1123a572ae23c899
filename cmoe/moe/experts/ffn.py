"""Feed-forward experts, as in Shazeer et al. 2017 and Switch; gated ones from Shazeer 2020 (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Fraction
from cmoe.moe.experts.base import ACTIVATIONS, Expert, LinearMap, init_linear

# gated forms: what is done with the gate before it is multiplied with the values
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
PLAIN = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh")


class FFN(Expert):
    """Feed-forward network: two linear maps with an activation between them, or a gated one such as SwiGLU.

    Parameters: `w1` (E, D, H), gated (E, D, 2H) with the gate first; `b1` (E, H or 2H); `w2` (E, H, O); `b2` (E, O).
    Without `hidden`, H is 4·D.

    Options:
        activation: 'gelu', 'gelu_tanh' (its approximation by tanh), 'quick_gelu' (x·σ(1.702 x)), 'relu', 'relu2' (squared),
            'silu', 'tanh', or gated 'swiglu', 'geglu', 'geglu_tanh', 'reglu'.
        dropout: share of hidden units that is dropped while training.
        init: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).
        bias: whether the linear maps have a bias.
    """

    widens = True

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        activation: Literal[
            "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh", "swiglu", "geglu", "geglu_tanh", "reglu"
        ] = "gelu",
        dropout: Fraction = 0.0,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
        bias: bool = True,
    ) -> None:
        hidden = hidden or 4 * dim
        super().__init__(n, dim, hidden, out_dim)
        if activation not in (*PLAIN, *GATES):
            raise ValueError(f"ffn: activation: expected one of {(*PLAIN, *GATES)}, got {activation!r}")
        self.activation, self.dropout, self.init = activation, dropout, init
        inner = 2 * hidden if activation in GATES else hidden
        self.w1 = nn.Parameter(torch.zeros(n, dim, inner))
        self.b1 = nn.Parameter(torch.zeros(n, inner)) if bias else None
        self.w2 = nn.Parameter(torch.zeros(n, hidden, out_dim))
        self.b2 = nn.Parameter(torch.zeros(n, out_dim)) if bias else None

    def stacked(self) -> tuple[Tensor | None, ...]:
        return self.w1, self.b1, self.w2, self.b2

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        w1, b1, w2, b2 = parameters
        assert w1 is not None
        assert w2 is not None
        h = linear(x, w1, b1)
        if self.activation in GATES:
            gate, up = h.chunk(2, dim=-1)
            h = ACTIVATIONS[GATES[self.activation]](gate) * up
        else:
            h = ACTIVATIONS[self.activation](h)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        return linear(h, w2, b2)

    def units(self) -> dict[str, tuple[int, int]]:
        gated = 2 if self.activation in GATES else 1
        held = {"w1": (1, gated), "b1": (0, gated), "w2": (0, 1)}
        return {name: where for name, where in held.items() if getattr(self, name) is not None}

    def reset_parameters(self) -> None:
        init_linear(self.w1, self.b1, self.init)
        init_linear(self.w2, self.b2, self.init)

    @torch.no_grad()
    def zero_output(self) -> None:
        self.w2.zero_()
        if self.b2 is not None:
            self.b2.zero_()
