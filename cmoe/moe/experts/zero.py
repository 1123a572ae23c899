"""The zero expert of MoE++ (Jin et al. 2024, https://arxiv.org/abs/2410.07348)."""

from __future__ import annotations

from torch import Tensor

from cmoe.moe.dispatch import Block, working_dtype
from cmoe.moe.experts.base import Expert, LinearMap, dense_linear


class Zero(Expert):
    """Expert that gives 0: a token that it is chosen for gets less from the layer, at no cost.

    Without parameters; meant as `more` beside experts of another kind.
    """

    def __init__(self, n: int, dim: int, hidden: int | None, out_dim: int) -> None:
        super().__init__(n, dim, None, out_dim)

    def stacked(self) -> tuple[Tensor | None, ...]:
        return ()

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_dim, dtype=working_dtype(x))

    def work(self, x_ND: Tensor, block: Block, path: str) -> Tensor:
        return self.compute(x_ND, dense_linear)

    def reset_parameters(self) -> None:
        pass

    def zero_output(self) -> None:
        pass
