"""Balanced assignments: every expert gets as many tokens of a training batch as every other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.moe.routers.parts import select, weigh
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class Sinkhorn(Scored):
    """Sinkhorn: while training, tokens go to the experts of the balanced transport plan nearest to their scores.

    Clark et al. 2022 (S-BASE), https://arxiv.org/abs/2202.01169. Outside training the plain best scores decide. Weights
    are the sigmoids of the scores.

    Options:
        k: experts per token.
        iterations: rounds of normalisation at most.
    """

    k: PositiveInt = 1
    iterations: PositiveInt = 50

    causal = False

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        if not training:
            return select.top_k(scores_TE, self.k)
        plan_TE = scores_TE.detach().clone()
        if context.valid is None:
            return select.top_k(select.sinkhorn(plan_TE, self.iterations), self.k)
        rows = context.valid.nonzero().squeeze(1)
        plan_TE[rows] = select.sinkhorn(plan_TE.index_select(0, rows), self.iterations)
        return select.top_k(plan_TE, self.k)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.sigmoid(scores_TE, columns_TK, absent_TK)

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class Base(Scored):
    """BASE: while training, a linear assignment gives every expert as many tokens, with the highest sum of scores.

    Lewis et al. 2021, https://arxiv.org/abs/2103.16716. Outside training a token goes to its best expert. Weights are
    sigmoids of the scores. The assignment is found by auction, on the CPU as fast as anywhere.
    """

    switch: NonNegative = field(init=False, default=0.0)  # everyone has the same load

    causal = False

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        if not training:
            return select.top_k(scores_TE, 1)
        if context.valid is None:
            return select.auction(scores_TE).unsqueeze(1), None
        rows = context.valid.nonzero().squeeze(1)
        chosen_T = scores_TE.argmax(1)
        chosen_T[rows] = select.auction(scores_TE.index_select(0, rows))
        return chosen_T.unsqueeze(1), None

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.sigmoid(scores_TE, columns_TK, absent_TK)

    def experts_per_token(self, experts: ExpertView) -> int:
        return 1
