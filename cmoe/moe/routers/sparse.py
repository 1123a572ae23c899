"""What all routers that assign tokens to experts have: among which experts, and whether by token or by sequence."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.moe.routers.parts.groups import Groups
from cmoe.moe.routing import RouteContext, Router, Routing
from cmoe.moe.view import NONE, Columns, ExpertView


@dataclass(eq=False, repr=False)
class Sparse(Router):
    """Base of routers that assign tokens to experts; a method says how, in `_route`.

    Scores are computed in at least float32.

    Options:
        restrict: 'task' lets a token see only the experts assigned to its task (a task without any sees all; in a batch
            of several tasks each task's tokens are routed apart), 'none' all that the context lets it see.
        level: 'token' routes each token by itself; 'sequence' routes all tokens of a sequence alike, by their mean, so
            that losses and a capacity count sequences. Not causal: the mean holds later tokens too. A vector outside any
            sequence is a sequence of its own.
    """

    dim: int
    _: KW_ONLY
    restrict: Literal["none", "task"] = "none"
    level: Literal["token", "sequence"] = "token"

    causal = True
    permutation_equivariant = True
    isolatable = True  # with `restrict: task`, or with a context that says what is visible
    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "restrict": {"task": ("task",)},
        "level": {"sequence": ("sequence",)},
    }
    causal_with: ClassVar[dict[str, dict[str, bool]]] = {"level": {"sequence": False}}
    by_token_id: ClassVar[bool] = False  # whether token ids decide, which a sequence has no mean of

    def __post_init__(self) -> None:
        options = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        super().__init__(self.dim)
        for name, value in options.items():
            setattr(self, name, value)
        self.check()
        for option, by_value in self.needs_with.items():
            self.needs = self.needs | set(by_value.get(getattr(self, option), ()))
        if self.level == "sequence":
            self.causal = False

    def check(self) -> None:
        """Refuse options out of range.

        Raises:
            ValueError: with the option's name.
        """
        for name, known in (("restrict", ("none", "task")), ("level", ("token", "sequence"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.level == "sequence" and self.by_token_id:
            raise ValueError("level: expected 'token' where token ids decide, got 'sequence'")

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        """Assign tokens to these columns; `dropped`, where there is any, still has one number per token."""
        raise NotImplementedError(f"{type(self).__name__} must define _route(x_TD, context, columns, training)")

    def _among(self, experts: ExpertView, context: RouteContext, training: bool) -> Columns:
        """The columns that a batch of one task, or of no matter which, may choose from."""
        return experts.slice(self._visible(context, experts))

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        if self.restrict == "task" and isinstance(context.task, Tensor):
            return self._by_label(x_TD, context, context.task, experts)
        training = self.training if context.training is None else context.training
        columns = self._among(experts, context, training)
        route = self._by_sequence if self.level == "sequence" else self._route
        if torch.is_autocast_enabled(x_TD.device.type):
            # the selective precision of Switch: bfloat16 scores would tie and flip choices
            with torch.autocast(x_TD.device.type, enabled=False):
                routing = route(x_TD.float(), context, columns, training)
        else:
            routing = route(x_TD, context, columns, training)
        if routing.dropped is not None:
            routing.dropped = routing.dropped.sum()
        return routing

    def _visible(self, context: RouteContext, experts: ExpertView) -> tuple[int, ...] | None:
        if self.restrict == "none":
            return context.visible
        if not isinstance(context.task, int):
            raise ValueError("restrict: task needs a task label in the context, got none")
        assigned = experts.tasks.get(context.task)
        if assigned is None or context.visible is None:
            return assigned or context.visible
        return tuple(expert for expert in assigned if expert in context.visible)

    def _by_label(self, x_TD: Tensor, context: RouteContext, task_T: Tensor, experts: ExpertView) -> Routing:
        """A batch of several tasks: each task's tokens are routed as if they came alone.

        Auxiliary losses are averaged with the shares of the tokens. There is no common score matrix, so no logits.
        """
        order_T, groups, aux = [], [], {}
        dropped: Tensor | None = None
        for label in task_T.unique().tolist():
            of_label = (task_T == label).nonzero().squeeze(1)
            fields = _rows_of(context, of_label, ("token_ids", "sequence", "position", "valid", "replay", "state"))
            routing = self(x_TD.index_select(0, of_label), replace(context, task=int(label), **fields), experts)
            for name, loss in routing.aux.items():
                aux[name] = aux.get(name, 0.0) + loss * (len(of_label) / len(x_TD))
            if routing.dropped is not None:
                dropped = routing.dropped if dropped is None else dropped + routing.dropped
            order_T.append(of_label)
            groups.append(routing)
        if not groups:  # no token, no label
            return self(x_TD, replace(context, task=next(iter(experts.tasks), 0)), experts)
        back_T = torch.cat(order_T).argsort()
        k = max(g.ids.shape[1] for g in groups)
        ids_TK = torch.cat([F.pad(g.ids, (0, k - g.ids.shape[1]), value=NONE) for g in groups])
        weights_TK = torch.cat([F.pad(g.weights, (0, k - g.weights.shape[1])) for g in groups])
        states = [g.state for g in groups if g.state is not None]
        left_TK: Tensor | None = None
        if any(g.left is not None for g in groups):
            left = [torch.full_like(g.ids, NONE) if g.left is None else g.left for g in groups]
            left_TK = torch.cat([F.pad(own, (0, k - own.shape[1]), value=NONE) for own in left])
        return Routing(
            ids=ids_TK.index_select(0, back_T),
            weights=weights_TK.index_select(0, back_T),
            columns=experts.ids,
            aux=aux,
            state=torch.cat(states).index_select(0, back_T) if len(states) == len(groups) else None,
            dropped=dropped,
            valid=context.valid,
            left=None if left_TK is None else left_TK.index_select(0, back_T),
        )

    def _by_sequence(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        """Every sequence is routed as one token, its mean; its tokens then go where it went."""
        groups = Groups(context.sequence, context.valid, x_TD)
        fields: dict[str, Any] = _rows_of(context, groups.first(), ("task", "replay", "state", "valid"))
        told = replace(context, **fields, sequence=None, position=None, token_ids=None)
        decided = self._route(groups.mean(x_TD), told, columns, training)

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, groups.of_T)

        ids_TK, weights_TK = spread(decided.ids), spread(decided.weights)
        dropped_T, left_TK = spread(decided.dropped), spread(decided.left)
        assert ids_TK is not None
        assert weights_TK is not None
        if context.valid is not None:
            padding_T1 = ~context.valid.unsqueeze(1)
            ids_TK, weights_TK = ids_TK.masked_fill(padding_T1, NONE), weights_TK.masked_fill(padding_T1, 0.0)
            dropped_T = None if dropped_T is None else dropped_T.masked_fill(padding_T1.squeeze(1), 0)
            left_TK = None if left_TK is None else left_TK.masked_fill(padding_T1, NONE)
        return replace(
            decided,
            ids=ids_TK,
            weights=weights_TK,
            logits=spread(decided.logits),
            log_probs=spread(decided.log_probs),
            state=spread(decided.state),
            dropped=dropped_T,
            valid=context.valid,
            left=left_TK,
        )


def _rows_of(context: RouteContext, rows: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """These rows of what the context has of each token."""
    return {name: value.index_select(0, rows) for name in names if isinstance(value := getattr(context, name), Tensor)}
