"""Routers in which each token takes as many experts as suit it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cmoe.config.types import Count, NonNegative, Positive, PositiveInt
from cmoe.moe import losses
from cmoe.moe.routers.parts import select, weigh
from cmoe.moe.routers.parts.scores import Score, Thresholded, product
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routers.topk import TopK
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class ReLU(Scored):
    """ReLU routing: every expert with a positive score works, weighted by it; an adaptive L1 loss holds the number.

    Wang et al. 2024 (ReMoE), https://arxiv.org/abs/2412.14711. The loss is λ · mean over tokens of Σₑ fₑ·relu(sₑ), with
    fₑ the expert's share of the load times E/k; λ is multiplied by `rate` while more than k experts work on average,
    and divided by it while fewer do. A token that suits no expert gets 0.

    Options:
        k: the mean number of experts per token to hold.
        rate: how fast λ changes.
        weight: the first λ.
    """

    k: PositiveInt = 2
    rate: Positive = 1.2
    weight: NonNegative = 1e-8

    exact_k = False
    fixed_k = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.register_buffer("strength", torch.tensor(float(self.weight)))

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.positive(scores_TE)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.relu(scores_TE, columns_TK, absent_TK)

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        positive_TE = scores_TE.relu()
        if context.valid is not None:
            positive_TE = torch.where(context.valid.unsqueeze(1), positive_TE, 0.0)
        tokens = len(scores_TE) if context.valid is None else max(int(context.valid.sum()), 1)
        share_E = (positive_TE.detach() > 0).to(scores_TE.dtype).sum(0) / max(tokens, 1)
        n, strength = scores_TE.shape[1], self.get_buffer("strength")
        loss = strength.to(scores_TE.dtype, copy=True) * ((share_E * n / self.k) * positive_TE).sum() / max(tokens, 1)
        with torch.no_grad():
            mean = float(share_E.sum())
            strength.mul_(self.rate ** float((mean > self.k) - (mean < self.k)))
        return {"l1": loss}

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class NullExperts(TopK):
    """Null experts: top-k over the experts and some that do nothing, so that easy tokens take fewer.

    Zeng et al. 2024 (AdaMoE), https://arxiv.org/abs/2406.13233. Weights are the softmax over the true experts chosen; a
    token that chose none gets 0.

    Options:
        null: how many null experts.
    """

    k: PositiveInt = 3
    null: Count = 2

    exact_k = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.nulls = nn.Parameter(torch.empty(self.null, self.dim).normal_(0.0, self.init_std))

    def check(self) -> None:
        super().check()
        if self.noise != "none":
            raise ValueError(f"null_experts: noise: expected 'none', got {self.noise!r}")

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool):
        self._null_TN = product(x_TD, self.nulls)
        try:
            return super()._route(x_TD, context, columns, training)
        finally:
            del self._null_TN

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        n = scores_TE.shape[1]
        all_TA = torch.cat([scores_TE, self._null_TN.to(scores_TE.dtype)], 1)
        columns_TK = all_TA.topk(min(self.k, all_TA.shape[1]), dim=-1).indices
        absent_TK = columns_TK >= n
        return columns_TK.masked_fill(absent_TK, 0), absent_TK

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        if not self.switch or not self.null:
            return {}
        # the nulls are alike, so each counts with the mean share of all of them, as in the paper: it does not matter which
        # of them a token takes
        all_TA = torch.cat([scores_TE, self._null_TN.to(scores_TE.dtype)], 1)
        probs_TA = all_TA.softmax(-1)
        chosen_TK = all_TA.topk(min(self.k, all_TA.shape[1]), dim=-1).indices
        return {"switch": self.switch * losses.switch_loss(probs_TA, chosen_TK, context.valid, alike=self.null)}


@dataclass(eq=False, repr=False, kw_only=True)
class Threshold(Scored):
    """Per-expert thresholds: an expert works on the tokens whose cosine with it exceeds what it asks for.

    Guo et al. 2024 (DYNMoE), https://arxiv.org/abs/2405.14297. A token that no expert wants goes to the best one.
    Weights are equal; the gradient passes straight through the comparison.
    """

    init_std: NonNegative = field(init=False, default=0.02)

    exact_k = False
    fixed_k = False

    def make_score(self) -> Score:
        return Thresholded(self.dim)

    def _margins(self, scores_TE: Tensor, columns: Columns) -> Tensor:
        rows = [self.rows_of(key, rows, columns, scores_TE.device) for key, rows in columns.parts]
        threshold_E = torch.cat([own.threshold for own in rows]).to(scores_TE.dtype)
        return scores_TE.sigmoid() - threshold_E.sigmoid()

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.positive(self._margins(scores_TE, columns), at_least_one=True)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        margin_TK = self._margins(scores_TE, columns).gather(1, columns_TK)
        ones_TK = torch.ones_like(margin_TK) + margin_TK - margin_TK.detach()  # straight through
        ones_TK = ones_TK if absent_TK is None else ones_TK.masked_fill(absent_TK, 0.0)
        return ones_TK / ones_TK.detach().sum(1, keepdim=True).clamp(min=1.0)

    def experts_per_token(self, experts: ExpertView) -> int:
        return max(1, math.ceil(len(experts) / 2))
