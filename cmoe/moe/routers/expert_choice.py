"""Expert choice: experts take tokens, not tokens experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cmoe.config.types import NonNegative, Positive
from cmoe.moe.routers.parts import capacity, select
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class ExpertChoice(Scored):
    """Expert choice: each expert takes the ⌈factor · tokens / experts⌉ tokens that suit it best.

    Zhou et al. 2022, https://arxiv.org/abs/2202.09368. The load is balanced by construction; a token gets any number of
    experts, possibly none. What others are in the batch decides, later tokens of a sequence included: not for decoders,
    and at evaluation the answer depends on the batch.

    Options:
        factor: how many experts a token gets on average.
    """

    factor: Positive = 2.0
    switch: NonNegative = field(init=False, default=0.0)  # everyone has the same load

    causal = False
    exact_k = False
    isolatable = True

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        probs_TE = scores_TE.softmax(-1)
        if context.valid is None:
            each = capacity.places(self.factor, len(probs_TE), len(columns))
            return select.by_experts(probs_TE, each)
        each = capacity.places(self.factor, int(context.valid.sum()), len(columns))
        return select.by_experts(probs_TE.masked_fill(~context.valid.unsqueeze(1), -1.0), each)

    def experts_per_token(self, experts: ExpertView) -> int:
        return max(1, min(round(self.factor), len(experts)))
