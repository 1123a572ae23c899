"""Soft MoE: experts work on mixtures of a sequence's tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import PositiveInt
from cmoe.moe.routers.parts.groups import Groups
from cmoe.moe.routers.parts.scores import Rows, exact, product
from cmoe.moe.routing import RouteContext, Router, Routing, SoftRouting
from cmoe.moe.view import Columns, ExpertView


class Soft(Router):
    """Soft MoE: each expert works on slots, which are weighted means of a sequence's tokens; nothing is left out.

    Puigcerver et al. 2023, https://arxiv.org/abs/2308.00951. The score of a slot and a token is the cosine of their
    vectors times a learned scale; its softmax over the tokens says what is in a slot, that over all slots what a token
    gets back. The cost depends on the number of slots, not of experts. All tokens of a sequence see each other: not for
    decoders. A vector outside any sequence is a sequence of its own, and each of its slots then holds that vector: a
    dense mixture.

    Options:
        slots: slots of each expert in a sequence; in the paper about as many in all as a sequence has tokens.
    """

    causal = False
    permutation_equivariant = True  # within a sequence
    exact_k = True
    isolatable = True
    needs: frozenset[str] = frozenset({"sequence"})
    routing_kind = "soft"

    def __init__(self, dim: int, slots: PositiveInt = 1) -> None:
        super().__init__(dim)
        if slots < 1:
            raise ValueError(f"soft: slots: expected at least 1, got {slots}")
        self.slots = slots
        self.scale = nn.Parameter(torch.ones(()))

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.slots, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        columns.weight.normal_(0.0, 1.0 / math.sqrt(self.dim))

    def experts_per_token(self, experts: ExpertView) -> int:
        return len(experts)

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        refuse_replay("soft", context)
        columns = experts.slice(context.visible)
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._slots(exact(x_TD), context, columns)

    def _slots(self, x_TD: Tensor, context: RouteContext, columns: Columns) -> SoftRouting:
        groups, valid_T = Groups(context.sequence, context.valid, x_TD), context.valid
        if valid_T is not None:  # padding may be anything
            x_TD = torch.where(valid_T.unsqueeze(1), x_TD, 0.0)
        unit_TD = F.normalize(x_TD, dim=1) * exact(self.scale)
        scores = [
            product(unit_TD, F.normalize(exact(slots), dim=2).flatten(0, 1))
            for slots in visible_rows(self.columns, columns, x_TD.device)
        ]
        length, place_T = groups.padded()
        scores_TS, present_T = torch.cat(scores, 1), valid_T
        if place_T is not None:
            places = groups.count * length
            present_T = torch.ones_like(place_T, dtype=torch.bool) if valid_T is None else valid_T
            present_T = present_T.new_zeros(places).index_copy(0, place_T, present_T)
            scores_TS = scores_TS.new_zeros(places, scores_TS.shape[1]).index_copy(0, place_T, scores_TS)
        scores_GLS = scores_TS.view(groups.count, length, scores_TS.shape[1])
        if present_T is None:
            dispatch_GLS, combine_GLS = scores_GLS.softmax(1), scores_GLS.softmax(2)
        else:
            present_GL1 = present_T.view(groups.count, length, 1)
            lowest = torch.finfo(scores_GLS.dtype).min  # finite, so that a sequence of padding has no NaN
            dispatch_GLS = scores_GLS.masked_fill(~present_GL1, lowest).softmax(1).masked_fill(~present_GL1, 0.0)
            combine_GLS = scores_GLS.softmax(2).masked_fill(~present_GL1, 0.0)
        routing = SoftRouting(dispatch_GLS, combine_GLS, self.slots, columns.ids, place_T)
        routing.valid = valid_T
        return routing


def refuse_replay(name: str, context: RouteContext) -> None:
    """There are no ids to choose again.

    Raises:
        ValueError: the context has some.
    """
    if context.replay is not None:
        raise ValueError(f"{name}: replay: expected none, this router assigns tokens to no expert")


def visible_rows(modules: nn.ModuleDict, columns: Columns, device: torch.device) -> list[Tensor]:
    """The vectors of the visible experts, cohort by cohort."""
    found = []
    for key, rows in columns.parts:
        own: Any = modules[key]
        weight: Tensor = own.weight
        found.append(weight if rows is None else weight.index_select(0, columns.rows(key, rows, device)))
    return found
