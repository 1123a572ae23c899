"""SparseMixer: a gradient for the choice of one expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmoe.config.types import NonNegative
from cmoe.moe.routers.parts import select
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class SparseMixer(Scored):
    """SparseMixer: one expert, sampled while training, with a third-order estimate of the gradient of the choice.

    Liu et al. 2023, https://arxiv.org/abs/2310.00811; as in GRIN, https://arxiv.org/abs/2409.12136. Experts whose score is
    less than (1 − 2·jitter) of the best are left out of the softmax. While training, one of the others is drawn from it;
    where that is not the best, Heun's third-order rule looks at the output with a third of the weight in three of four
    cases, and the gradient is that of the whole weight. Outside training the best expert works.

    Options:
        jitter: how far below the best an expert still counts.
    """

    jitter: NonNegative = 0.1
    switch: NonNegative = 0.01

    permutation_equivariant = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._point_T1: Tensor | None = None  # from `select` to `weigh`

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        if not training:
            return select.top_k(scores_TE, 1)
        near_TE, best_T1 = self._near(scores_TE.detach())
        uniform_TE = _uniform(near_TE, context)
        gumbel_TE = -(-uniform_TE.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        drawn_T1 = (near_TE + gumbel_TE).argmax(1, keepdim=True)
        whole_T1 = (drawn_T1 == best_T1) | (_uniform(near_TE[:, :1], context) > 0.75)
        self._point_T1 = (1.0 + 2.0 * whole_T1.to(scores_TE.dtype)) / 3.0
        return drawn_T1, None

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        near_TE, _ = self._near(scores_TE)
        weights_TK = near_TE.softmax(-1).gather(1, columns_TK)
        if self._point_T1 is not None:
            weights_TK = weights_TK - weights_TK.detach() * (1 - self._point_T1)  # the gradient of the whole
            self._point_T1 = None
        return weights_TK if absent_TK is None else weights_TK.masked_fill(absent_TK, 0.0)

    def _near(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The scores with −inf where they are too far below the best, and the best's column."""
        with torch.no_grad():
            highest_T1, best_T1 = scores_TE.max(1, keepdim=True)
            far_TE = (highest_T1 - scores_TE) / torch.maximum(scores_TE.abs(), highest_T1) > 2 * self.jitter
        return scores_TE.masked_fill(far_TE, -math.inf), best_T1

    def experts_per_token(self, experts: ExpertView) -> int:
        return 1


def _uniform(like: Tensor, context: RouteContext) -> Tensor:
    return torch.rand(like.shape, generator=context.generator, device=like.device, dtype=like.dtype)
