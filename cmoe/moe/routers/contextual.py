"""Routers whose scores look beyond one product: attention among experts, memory over layers, centroids."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.config.types import Fraction, NonNegative, PositiveInt
from cmoe.moe.routers.parts import scores
from cmoe.moe.routers.parts.scores import Score
from cmoe.moe.routers.topk import TopK
from cmoe.moe.routing import RouteContext, Routing
from cmoe.moe.view import Columns


@dataclass(eq=False, repr=False, kw_only=True)
class Attention(TopK):
    """Attention router: experts attend to one another on each token before they are chosen.

    Wu et al. 2024 (Yuan 2.0-M32), https://arxiv.org/abs/2405.17976. An expert's score depends on which others are
    visible.
    """

    orthogonality: NonNegative = field(init=False, default=0.0)
    init_std: NonNegative = field(init=False, default=0.02)

    isolatable = True

    def make_score(self) -> Score:
        return scores.Attention(self.dim, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("attention: noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")


@dataclass(eq=False, repr=False, kw_only=True)
class Recurrent(TopK):
    """Recurrent router: a recurrent unit carries what earlier layers' routers saw of a token.

    Qiu et al. 2024 (layerwise recurrent router), https://arxiv.org/abs/2408.06793. The first layer begins with zeros.

    Options:
        rank: units of the recurrent state, the same in all layers.
    """

    rank: PositiveInt = 32

    def make_score(self) -> Score:
        return scores.Recurrent(self.dim, self.rank, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise in ("shazeer", "jitter"):
            raise ValueError(f"recurrent: noise: expected 'none' or 'gaussian', got {self.noise!r}")


@dataclass(eq=False, repr=False, kw_only=True)
class KMeans(TopK):
    """K-means router: a token goes to the experts of the nearest centroids, which follow their tokens.

    As in MixER (Nzoyem et al. 2025, https://arxiv.org/abs/2502.05043): no gradient reaches the router; each training
    batch moves a centroid towards the mean of the tokens that it is nearest to. A balance loss could only move the
    backbone, so there is none unless it is asked for.

    Options:
        rate: how far a centroid moves, 1 − the decay of its mean.
    """

    rate: Fraction = 0.01
    k: PositiveInt = 1
    switch: NonNegative = 0.0
    orthogonality: NonNegative = field(init=False, default=0.0)
    init_std: NonNegative = field(init=False, default=0.02)

    def make_score(self) -> Score:
        return scores.Centroid(self.dim)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("kmeans: noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        self._x_TD = x_TD.detach()  # for `learn_from`: centroids follow the tokens, not their scores
        try:
            return super()._route(x_TD, context, columns, training)
        finally:
            del self._x_TD

    @torch.no_grad()
    def learn_from(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> None:
        nearest_TE = F.one_hot(columns_TK[:, 0], len(columns)).to(self._x_TD.dtype)
        if absent_TK is not None:
            nearest_TE = nearest_TE.masked_fill(absent_TK[:, :1], 0.0)
        count_E = nearest_TE.sum(0)
        mean_ED = nearest_TE.T @ self._x_TD / count_E.clamp(min=1.0).unsqueeze(1)

        def moved(centre_ED: Tensor, own: slice) -> Tensor:
            share_E1 = (count_E[own] > 0).to(centre_ED.dtype).unsqueeze(1) * self.rate
            return centre_ED + share_E1 * (mean_ED[own].to(centre_ED.dtype) - centre_ED)

        self.update_rows("centre", columns, moved)
