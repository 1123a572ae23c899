"""SparseMixer: a gradient for the choice of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmoe.config.types import NonNegative
from cmoe.moe.routers.parts import select
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


class _Midpoint(torch.autograd.Function):
    """The weight as it is; backward, the mid-point estimate of the gradient of the expected output."""

    @staticmethod
    def forward(ctx: Any, weight_T1: Tensor, half_T1: Tensor) -> Tensor:
        ctx.save_for_backward(half_T1)
        return weight_T1.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (half_T1,) = ctx.saved_tensors
        return gradients[0] * half_T1, None


@dataclass(eq=False, repr=False, kw_only=True)
class SparseMixer(Scored):
    """SparseMixer: one expert, sampled while training, with a second-order estimate of the gradient of the choice.

    Liu et al. 2023, https://arxiv.org/abs/2310.00811; GRIN, https://arxiv.org/abs/2409.12136. Experts whose score is less
    than (1 − 2·jitter) of the best are not sampled; where the sampled expert is not the best, the mid-point rule halves
    the step. Outside training the best expert works.

    Options:
        jitter: how far below the best an expert is still sampled.
    """

    jitter: NonNegative = 0.1
    switch: NonNegative = 0.01

    permutation_equivariant = False

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        if not training:
            self._best_T1 = None
            return select.top_k(scores_TE, 1)
        best_T1, self._best_T1 = scores_TE.max(1, keepdim=True)
        gap_TE = (best_T1 - scores_TE) / torch.maximum(scores_TE.abs(), best_T1.abs()).clamp(min=1e-9)
        self._masked_TE = scores_TE.masked_fill(gap_TE > 2 * self.jitter, float("-inf"))
        uniform_TE = torch.rand(
            scores_TE.shape, generator=context.generator, device=scores_TE.device, dtype=scores_TE.dtype
        )
        gumbel_TE = -(-uniform_TE.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        return (self._masked_TE + gumbel_TE).argmax(1, keepdim=True), None

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        best_T1 = getattr(self, "_best_T1", None)
        if best_T1 is None or best_T1.shape != columns_TK.shape:
            weights_TK = scores_TE.softmax(-1).gather(1, columns_TK)
        else:
            weights_TK = self._masked_TE.softmax(-1).gather(1, columns_TK)
            # a third-order step where the best was drawn, the mid-point elsewhere (the paper's algorithm 1)
            half_T1 = torch.where(columns_TK == best_T1, 1.0, 0.5).to(weights_TK.dtype)
            weights_TK = _Midpoint.apply(weights_TK, half_T1)
            del self._masked_TE
            self._best_T1 = None
        return weights_TK if absent_TK is None else weights_TK.masked_fill(absent_TK, 0.0)

    def experts_per_token(self, experts: ExpertView) -> int:
        return 1
