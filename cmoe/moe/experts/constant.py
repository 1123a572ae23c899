"""The constant expert of MoE++ (Jin et al. 2024, https://arxiv.org/abs/2410.07348)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cmoe.moe.dispatch import Block
from cmoe.moe.experts.base import Expert, LinearMap, init_linear


class Constant(Expert):
    """Expert that gives α₁ x + α₂ v with a learned vector v and [α₁, α₂] = softmax(x W): nearly no cost.

    Parameters: `w` (E, D, 2), `v` (E, 1, O), drawn from N(0, 1). Meant as `more` beside experts of another kind. Input
    and output must be of one size.

    Options:
        init: of `w`: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).
    """

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
    ) -> None:
        super().__init__(n, dim, None, out_dim)
        if dim != out_dim:
            raise ValueError(f"constant: expected an output of the input's size {dim}, got {out_dim}")
        self.init = init
        self.w = nn.Parameter(torch.zeros(n, dim, 2))
        self.v = nn.Parameter(torch.zeros(n, 1, dim))

    def stacked(self) -> tuple[Tensor | None, ...]:
        return self.w, self.v

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        w, v = parameters
        assert w is not None
        assert v is not None
        share = linear(x, w, None).softmax(-1)
        constant = linear(share[..., 1:], v, None)
        return share[..., :1].to(constant.dtype) * x.to(constant.dtype) + constant

    def work(self, x_ND: Tensor, block: Block, path: str) -> Tensor:
        # its matrices have one and two columns, which no grouped product takes
        return super().work(x_ND, block, "auto" if path == "grouped" else path)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_linear(self.w, None, self.init)
        self.v.normal_()
