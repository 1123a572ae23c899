"""Softmax top-k routing, with noise as an option.

Top-k before the softmax is Mixtral's rule (Jiang et al. 2024, https://arxiv.org/abs/2401.04088), after it that of GShard
and Switch (Fedus et al. 2021, https://arxiv.org/abs/2101.03961). The learned noise is that of Shazeer et al. 2017
(https://arxiv.org/abs/1701.06538), the fixed one that of V-MoE (Riquelme et al. 2021,
https://arxiv.org/abs/2106.05974).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.moe import losses
from cmoe.moe.routers.parts import select, weigh
from cmoe.moe.routers.parts.scores import Linear, Rows, Score, product
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


class NoisyLinear(Linear):
    """x · w, with a second vector per expert for the scale of its noise."""

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim), noise=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        super().reset_columns(columns)
        columns.noise.zero_()  # softplus(0): some noise for all, as in the paper


@dataclass(eq=False, repr=False, kw_only=True)
class TopK(Scored):
    """Softmax top-k: each token goes to the k experts with the highest scores, optionally noisy while training.

    With fewer than k experts visible, all are used.

    Options:
        k: experts per token.
        order: top-k 'before' the softmax (weights are the softmax over the chosen k and sum to 1; with k = 1 the
            router then learns from the auxiliary losses only) or 'after' it (weights are the probabilities among all
            visible experts, with a sum of at most 1).
        noise: while training, 'none'; 'shazeer', N(0,1)·softplus(x·Wn) with Wn learned; 'gaussian', N(0,1)/E (V-MoE);
            or 'jitter', scores of x·U(1±0.01) (Switch).
        load: weight of the squared coefficient of variation of the smooth load; needs noise 'shazeer'.
    """

    k: PositiveInt = 2
    order: Literal["before", "after"] = "before"
    noise: Literal["none", "shazeer", "gaussian", "jitter"] = "none"
    load: NonNegative = 0.0
    switch: NonNegative = 0.01

    def check(self) -> None:
        super().check()
        if self.k < 1:
            raise ValueError(f"topk: k: expected at least 1, got {self.k}")
        for name, known in (("order", ("before", "after")), ("noise", ("none", "shazeer", "gaussian", "jitter"))):
            if getattr(self, name) not in known:
                raise ValueError(f"topk: {name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.load and self.noise != "shazeer":
            raise ValueError("topk: load: the smooth load is defined for noise: shazeer only")

    def make_score(self) -> Score:
        kind = NoisyLinear if self.noise == "shazeer" else Linear
        return kind(self.dim, self.init_std)

    def perturb(
        self, x_TD: Tensor, scores_TE: Tensor, columns: Columns, context: RouteContext
    ) -> tuple[Tensor, Tensor | None]:
        if self.noise == "none":
            return scores_TE, None
        if self.noise == "jitter":
            factor_TD = torch.rand(x_TD.shape, generator=context.generator, device=x_TD.device, dtype=x_TD.dtype)
            return self._scores(x_TD * (0.99 + 0.02 * factor_TD), context, columns)[0], None
        noise_TE = torch.randn(
            scores_TE.shape, generator=context.generator, device=scores_TE.device, dtype=scores_TE.dtype
        )
        if self.noise == "gaussian":
            return scores_TE + noise_TE / max(scores_TE.shape[1], 1), None
        rows = [self.rows_of(key, rows, columns, x_TD.device) for key, rows in columns.parts]
        scale_TE = F.softplus(torch.cat([product(x_TD, own.noise) for own in rows], 1))
        return scores_TE + noise_TE * scale_TE, scale_TE

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.top_k(scores_TE, self.k)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        rule = weigh.softmax_chosen if self.order == "before" else weigh.softmax_all
        return rule(scores_TE, columns_TK, absent_TK)

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        if not self.load or scale_TE is None:
            return {}
        k = columns_TK.shape[1]
        return {"load": self.load * losses.load_loss(scores_TE, chosen_TE, scale_TE, k, context.valid)}

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))
