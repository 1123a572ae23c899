"""SMEAR: experts are merged for each sequence before they work."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Fraction, NonNegative
from cmoe.moe.routers.parts import dropout
from cmoe.moe.routers.parts.groups import Groups
from cmoe.moe.routers.parts.scores import Rows, exact, product
from cmoe.moe.routers.soft import refuse_replay, visible_rows
from cmoe.moe.routing import MergeRouting, RouteContext, Router, Routing
from cmoe.moe.view import Columns, ExpertView


class Smear(Router):
    """SMEAR: a sequence goes through one expert, the mean of all experts' weights by the router's probabilities.

    Muqeeth et al. 2023, https://arxiv.org/abs/2306.03745. The router sees the mean token of a sequence, normed; all its
    tokens have the same expert, so that it is not for decoders. A vector outside any sequence is a sequence of its own:
    then there is an expert for each of them, which takes as much memory. Experts must be of one kind and size.

    Options:
        norm: 'layer' (learned layer norm of the mean token) or 'none'.
        expert_dropout: probability with which an expert is left out for a sequence while training; one always stays.
        init_std: standard deviation of the initial expert vectors.
    """

    causal = False
    permutation_equivariant = True  # within a sequence
    exact_k = True
    isolatable = True
    needs: frozenset[str] = frozenset({"sequence"})
    routing_kind = "merge"

    def __init__(
        self,
        dim: int,
        norm: Literal["layer", "none"] = "layer",
        expert_dropout: Fraction = 0.1,
        init_std: NonNegative = 0.02,
    ) -> None:
        super().__init__(dim)
        if norm not in ("layer", "none"):
            raise ValueError(f"smear: norm: expected 'layer' or 'none', got {norm!r}")
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"smear: expert_dropout: expected at least 0 and less than 1, got {expert_dropout}")
        self.expert_dropout, self.init_std = expert_dropout, init_std
        self.norm = nn.LayerNorm(dim) if norm == "layer" else None

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        columns.weight.normal_(0.0, self.init_std)

    def experts_per_token(self, experts: ExpertView) -> int:
        return 1  # as much work as one does

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        refuse_replay("smear", context)
        columns = experts.slice(context.visible)
        training = self.training if context.training is None else context.training
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._merged(exact(x_TD), context, columns, training)

    def _merged(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> MergeRouting:
        groups = Groups(context.sequence, context.valid, x_TD)
        mean_GD = groups.mean(x_TD)
        if self.norm is not None:
            weight, bias = exact(self.norm.weight), exact(self.norm.bias)
            mean_GD = F.layer_norm(mean_GD, (self.dim,), weight, bias, self.norm.eps)
        vectors = visible_rows(self.columns, columns, x_TD.device)
        scores_GE = torch.cat([product(mean_GD, own_ED) for own_ED in vectors], 1)
        if training and self.expert_dropout:
            stay_GE = dropout.kept(tuple(scores_GE.shape), self.expert_dropout, 1, context.generator)
            scores_GE = scores_GE.masked_fill(~stay_GE.to(scores_GE.device), -torch.inf)
        group_T = None if groups.count == 1 else groups.of_T
        routing = MergeRouting(scores_GE.softmax(1), group_T, len(x_TD), columns.ids)
        routing.valid = context.valid
        return routing
