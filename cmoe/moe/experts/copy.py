"""The copy expert of MoE++ (Jin et al. 2024, https://arxiv.org/abs/2410.07348)."""

from __future__ import annotations

from torch import Tensor

from cmoe.moe.dispatch import Block, working_dtype
from cmoe.moe.experts.base import Expert, LinearMap, dense_linear


class Copy(Expert):
    """Expert that gives its input: a token that it is chosen for passes the layer by, at no cost.

    Without parameters; meant as `more` beside experts of another kind. Input and output must be of one size.
    """

    def __init__(self, n: int, dim: int, hidden: int | None, out_dim: int) -> None:
        super().__init__(n, dim, None, out_dim)
        if dim != out_dim:
            raise ValueError(f"copy: expected an output of the input's size {dim}, got {out_dim}")

    def stacked(self) -> tuple[Tensor | None, ...]:
        return ()

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        return x.to(working_dtype(x), copy=True)  # never the very same memory: a caller may write into its output

    def work(self, x_ND: Tensor, block: Block, path: str) -> Tensor:
        return self.compute(x_ND, dense_linear)

    def reset_parameters(self) -> None:
        pass
