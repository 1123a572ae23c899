"""StableMoE: learn where tokens go, hand it over to a small router, and let that one stay as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.moe import losses
from cmoe.moe.routers.parts import select, weigh
from cmoe.moe.routers.parts.scores import Linear, Rows, Score, exact, product
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext, Routing
from cmoe.moe.view import Columns, ExpertView


class Distilled(Linear):
    """x · w, beside a vector per expert for the distilled router and a count of the batches that trained it."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__(dim)
        self.rank = rank

    def new_columns(self, n: int) -> nn.Module:
        return Rows(counts=("age",), weight=(n, self.dim), light=(n, self.rank), age=(n,))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        nn.init.orthogonal_(columns.weight, gain=0.1)  # the authors' own
        nn.init.orthogonal_(columns.light, gain=0.1)
        columns.age.zero_()


@dataclass(eq=False, repr=False, kw_only=True)
class StableMoE(Scored):
    """StableMoE: routing is learned and distilled into a small router in a first stage, and then stays as it is.

    Dai et al. 2022, https://arxiv.org/abs/2204.08396. One expert for each token, weighted by the sigmoid of its score
    x · w. In the first stage the best score decides, also at evaluation; losses balance the load and teach the small
    router, apart from the rest of the model, to choose alike. The second stage begins for experts that were learned for
    `after` training batches (or with `stage` 1 of the routing context): experts that are added later bring the first one
    back, for those who see them, until they too were. The batches are counted beside each expert's vectors, so that a
    resumed run switches when it would have. Experts that are frozen before then learn no small router, and keep the first
    stage for those who see them.

    Options:
        after: training batches of the first stage; a tenth of all in the paper.
        distil: what the small router sees: the token's vector through a projection ('linear': a token's expert then
            changes as far as its vector does), or its vocabulary id through an embedding ('token_ids', the paper's own).
        vocabulary: how many token ids there are, with `distil: token_ids`.
        rank: dimensions of the projection or embedding.
        balance: weight of the balance loss, the mean over tokens of σ(score) · (n − n̄)/n̄, where n is how many tokens have
            the same expert and n̄ the mean of that.
        distillation: weight of the cross-entropy of the small router.
    """

    after: PositiveInt = 1000
    distil: Literal["linear", "token_ids"] = "linear"
    vocabulary: PositiveInt = 257
    rank: PositiveInt = 50
    balance: NonNegative = 0.3
    distillation: NonNegative = 0.3
    init_std: NonNegative = field(init=False, default=0.02)

    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "restrict": {"task": ("task",)},
        "level": {"sequence": ("sequence",)},
        "distil": {"token_ids": ("token_ids",)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        by_id = self.distil == "token_ids"
        self.light = nn.Embedding(self.vocabulary, self.rank) if by_id else nn.Linear(self.dim, self.rank, bias=False)

    def check(self) -> None:
        super().check()
        if self.distil not in ("linear", "token_ids"):
            raise ValueError(f"stable_moe: distil: expected 'linear' or 'token_ids', got {self.distil!r}")
        if self.distil == "token_ids" and self.level == "sequence":
            raise ValueError("stable_moe: level: expected 'token' with distil: token_ids, got 'sequence'")

    def make_score(self) -> Score:
        return Distilled(self.dim, self.rank)

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        rows = [self.rows_of(key, rows, columns, x_TD.device) for key, rows in columns.parts]
        self._frozen = context.stage > 0 or all(bool((own.age >= self.after).all()) for own in rows)
        if self._frozen or (training and self.distillation):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
                seen_TR = self._seen(x_TD.detach(), context)  # detached: the small router shapes nothing but itself
                self._light_TE = torch.cat([product(seen_TR, own.light) for own in rows], 1)
        try:
            return super()._route(x_TD, context, columns, training)
        finally:
            self._light_TE = None

    def _seen(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        if not isinstance(self.light, nn.Embedding):
            return product(x_TD, self.light.weight)
        ids_T = context.token_ids
        if ids_T is None:
            raise ValueError("stable_moe: expected token ids in the context, got none")
        if ids_T.numel() and int(ids_T.max()) >= self.vocabulary:
            raise ValueError(f"stable_moe: vocabulary: expected more than {int(ids_T.max())}, got {self.vocabulary}")
        return exact(self.light(ids_T))

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        if self._frozen:
            assert self._light_TE is not None
            return select.top_k(self._light_TE, 1)
        return select.top_k(scores_TE, 1)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.sigmoid(scores_TE, columns_TK, absent_TK)

    def learn_from(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> None:
        self.update_rows("age", columns, lambda age, own: age + 1)

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        if self._frozen:
            return {}
        found: dict[str, Tensor] = {}
        if self.balance:
            found["balance"] = self.balance * balance_loss(scores_TE, columns_TK[:, 0], context.valid)
        if self.distillation:
            assert self._light_TE is not None
            told_T = F.cross_entropy(self._light_TE, columns_TK[:, 0], reduction="none")
            found["router_distillation"] = self.distillation * losses.mean(told_T, context.valid)
        return found

    def experts_per_token(self, experts: ExpertView) -> int:
        return 1

    def active_parameters(self) -> int:
        # of an embedding, a token's own row
        unseen = self.light.num_embeddings - 1 if isinstance(self.light, nn.Embedding) else 0
        return super().active_parameters() - unseen * self.rank


def balance_loss(scores_TE: Tensor, column_T: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over tokens of σ(score of its expert) · (n − n̄)/n̄, n the tokens of that expert and n̄ the mean of it."""
    ones_T = torch.ones_like(column_T) if valid is None else valid.to(column_T.dtype)
    count_E = torch.zeros(scores_TE.shape[1], dtype=column_T.dtype, device=column_T.device).scatter_add(
        0, column_T, ones_T
    )
    mean = ones_T.sum().clamp(min=1) / scores_TE.shape[1]
    excess_E = (count_E - mean) / mean
    gate_T = scores_TE.gather(1, column_T.unsqueeze(1)).squeeze(1).sigmoid()
    return losses.mean(gate_T * excess_E.to(gate_T.dtype).index_select(0, column_T), valid)
