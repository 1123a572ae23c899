"""Routing by scores, in four parts that combine: score × select × weigh × capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import NonNegative
from cmoe.moe import losses
from cmoe.moe.routers.parts import capacity, weigh
from cmoe.moe.routers.parts.scores import Linear, Score
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routing import RouteContext, Router, Routing, score_dtype
from cmoe.moe.view import NONE, Columns, ExpertView


@dataclass(eq=False, repr=False)
class Scored(Router):
    """Base of routers by score: a preset says how it scores, selects and weighs.

    Scores are computed in at least float32. The options here are every preset's.

    Options:
        restrict: 'task' lets a token see only the experts assigned to its task (a task without any sees all; in a batch
            of several tasks each task's tokens are routed apart), 'none' all that the context lets it see.
        capacity: each expert takes at most ⌈capacity · tokens · experts per token / experts⌉ tokens of a batch; 0 is no
            limit (dropless). Tokens left out get 0 from that expert.
        drop: who is left out: later tokens ('order'), lower weights ('weight', batch priority routing, Riquelme et al.
            2021), or any ('random').
        switch: weight of the load balance loss of Switch, E·Σ f·P.
        importance: weight of the squared coefficient of variation of the experts' summed weights.
        z: weight of the mean squared logsumexp of the scores.
        entropy: weight of the mean entropy of each token's distribution over experts.
        orthogonality: weight of the mean squared cosine between different experts' score vectors.
        init_std: standard deviation of the initial score vectors.
    """

    dim: int
    _: KW_ONLY
    restrict: Literal["none", "task"] = "none"
    capacity: NonNegative = 0.0
    drop: Literal["order", "weight", "random"] = "order"
    switch: NonNegative = 0.0
    importance: NonNegative = 0.0
    z: NonNegative = 0.0
    entropy: NonNegative = 0.0
    orthogonality: NonNegative = 0.0
    init_std: NonNegative = 0.02

    causal = True
    permutation_equivariant = True
    exact_k = True
    fixed_k = True  # whether K of a batch is known before its tokens are
    isolatable = True  # with `restrict: task`, or with a context that says what is visible
    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {"restrict": {"task": ("task",)}}

    def __post_init__(self) -> None:
        options = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        super().__init__(self.dim)
        for name, value in options.items():
            setattr(self, name, value)
        self.check()
        self.score = self.make_score()
        if self.restrict == "task":
            self.needs = self.needs | {"task"}
        if self.capacity:
            # who else is in the batch decides who finds a place
            self.permutation_equivariant = self.drop == "weight"
            self.exact_k = False
            self.causal = self.causal and self.drop == "order" and self.fixed_k

    # -- what a preset defines -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse options out of range.

        Raises:
            ValueError: with the option's name.
        """
        for name, known in (("restrict", ("none", "task")), ("drop", ("order", "weight", "random"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")

    def make_score(self) -> Score:
        """How well each expert suits a token; linear by default."""
        return Linear(self.dim, self.init_std)

    def perturb(
        self, x_TD: Tensor, scores_TE: Tensor, columns: Columns, context: RouteContext
    ) -> tuple[Tensor, Tensor | None]:
        """Scores with noise, and its standard deviation; only asked while training."""
        return scores_TE, None

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        """Which columns each token goes to."""
        raise NotImplementedError(f"{type(self).__name__} must define select(...)")

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        """How much each chosen column counts; the softmax over all by default."""
        return weigh.softmax_all(scores_TE, columns_TK, absent_TK)

    def learn_from(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> None:
        """Adjust what is learned without a gradient; called once for each training batch."""

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        """Further auxiliary losses of a preset: from scores, scores with noise, and the noise's standard deviation."""
        return {}

    # -- the contract ---------------------------------------------------------------------------------------------

    def new_columns(self, n: int) -> nn.Module | None:
        return self.score.new_columns(n)

    def reset_columns(self, columns: nn.Module) -> None:
        self.score.reset_columns(columns)

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        if self.restrict == "task" and isinstance(context.task, Tensor):
            return self._by_label(x_TD, context, context.task, experts)
        columns = experts.slice(self._visible(context, experts))
        training = self.training if context.training is None else context.training
        if torch.is_autocast_enabled(x_TD.device.type):
            # the selective precision of Switch: bfloat16 scores would tie and flip choices
            with torch.autocast(x_TD.device.type, enabled=False):
                return self._route(x_TD.float(), context, columns, training)
        return self._route(x_TD, context, columns, training)

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
            fields = {
                name: value.index_select(0, of_label)
                for name in ("token_ids", "sequence", "position", "valid", "replay", "state")
                if isinstance(value := getattr(context, name), Tensor)
            }
            routing = self(x_TD.index_select(0, of_label), replace(context, task=int(label), **fields), experts)
            for name, loss in routing.aux.items():
                aux[name] = aux.get(name, 0.0) + loss * (len(of_label) / len(x_TD))
            if routing.dropped is not None:
                dropped = routing.dropped if dropped is None else dropped + routing.dropped
            order_T.append(of_label)
            groups.append(routing)
        back_T = torch.cat(order_T).argsort()
        k = max(g.ids.shape[1] for g in groups)
        ids_TK = torch.cat([F.pad(g.ids, (0, k - g.ids.shape[1]), value=NONE) for g in groups])
        weights_TK = torch.cat([F.pad(g.weights, (0, k - g.weights.shape[1])) for g in groups])
        return Routing(
            ids=ids_TK.index_select(0, back_T),
            weights=weights_TK.index_select(0, back_T),
            columns=experts.ids,
            aux=aux,
            dropped=dropped,
            valid=context.valid,
        )

    def _scores(self, x_TD: Tensor, context: RouteContext, columns: Columns) -> tuple[Tensor, Any]:
        # One product per cohort: an old column's scores never depend on how many came later, and a frozen cohort
        # takes no part in the backward pass beyond the input's gradient.
        h = self.score.tokens(x_TD, context)
        scores = [
            self.score(h, self.rows_of(key, rows, columns, x_TD.device), ids)
            for (key, rows), ids in zip(columns.parts, columns.members, strict=True)
        ]
        scores_TE = scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)
        return self.score.finish(scores_TE.to(score_dtype(x_TD.dtype))), h

    def rows_of(self, key: str, rows: tuple[int, ...] | None, columns: Columns, device: torch.device) -> Any:
        """A cohort's columns, or their visible rows."""
        if key not in self.columns:
            return None
        module = self.columns[key]
        return module if rows is None else Visible(module, columns.rows(key, rows, device))

    @torch.no_grad()
    def update_rows(self, name: str, columns: Columns, new: Callable[[Tensor, slice], Tensor]) -> None:
        """Replace a buffer of every visible expert; `new` gets a cohort's rows and where they stand in column order."""
        start = 0
        for (key, rows), ids in zip(columns.parts, columns.members, strict=True):
            own = slice(start, start + len(ids))
            start += len(ids)
            values = self.columns[key].get_buffer(name)
            if rows is None:
                values.copy_(new(values, own))
            else:
                index = columns.rows(key, rows, values.device)
                values.index_copy_(0, index, new(values.index_select(0, index), own))

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        scores_TE, h = self._scores(x_TD, context, columns)
        chosen_TE, scale_TE = self.perturb(x_TD, scores_TE, columns, context) if training else (scores_TE, None)
        if context.replay is None:
            columns_TK, absent_TK = self.select(chosen_TE, columns, context, training)
        else:
            columns.check(context.replay)
            columns_TK, absent_TK = columns.to_columns(context.replay), context.replay == NONE
        if context.valid is not None:
            invalid_T1 = ~context.valid.unsqueeze(1)
            absent_TK = invalid_T1.expand_as(columns_TK) if absent_TK is None else absent_TK | invalid_T1
        if training and context.replay is None:
            self.learn_from(scores_TE, columns_TK, absent_TK, columns)
        weights_TK = self.weigh(chosen_TE, columns_TK, absent_TK, columns)
        aux = self._losses(scores_TE, chosen_TE, scale_TE, weights_TK, columns_TK, absent_TK, columns, context) if training else {}  # fmt: skip
        dropped = None
        if self.capacity and context.replay is None:
            late_TK = self._late(columns_TK, absent_TK, weights_TK, len(columns), context)
            weights_TK = weights_TK.masked_fill(late_TK, 0.0)
            dropped = late_TK.sum()
            absent_TK = late_TK if absent_TK is None else absent_TK | late_TK
        ids_TK = columns.to_ids(columns_TK)
        if absent_TK is not None:
            ids_TK = ids_TK.masked_fill(absent_TK, NONE)
        state = h if self.score.carries_state else None
        return Routing(
            ids=ids_TK,
            weights=weights_TK,
            logits=scores_TE,
            columns=columns.ids,
            aux=aux,
            state=state,
            dropped=dropped,
            valid=context.valid,
        )

    def _late(
        self, columns_TK: Tensor, absent_TK: Tensor | None, weights_TK: Tensor, n: int, context: RouteContext
    ) -> Tensor:
        # from the number of tokens alone: what they chose must not tell earlier tokens of later ones
        tokens = len(columns_TK) if context.valid is None else int(context.valid.sum())
        each = capacity.places(self.capacity, tokens * columns_TK.shape[1], n)
        return capacity.over(columns_TK, absent_TK, weights_TK, n, each, self.drop, context.generator)

    def _losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        weights_TK: Tensor,
        columns_TK: Tensor,
        absent_TK: Tensor | None,
        columns: Columns,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        aux: dict[str, Tensor] = {}
        n, valid = len(columns), context.valid
        if self.switch:
            aux["switch"] = self.switch * losses.switch_loss(scores_TE.softmax(-1), columns_TK, valid, absent_TK)
        if self.importance:
            aux["importance"] = self.importance * losses.importance_loss(weights_TK, columns_TK, n)
        if self.z:
            aux["z"] = self.z * losses.z_loss(scores_TE, valid)
        if self.entropy:
            aux["entropy"] = self.entropy * losses.entropy_loss(scores_TE, valid)
        if self.orthogonality:
            vectors = [getattr(self.columns[key], "weight", None) for key, _ in columns.parts]
            aux["orthogonality"] = self.orthogonality * losses.orthogonality_loss([v for v in vectors if v is not None])
        return aux | self.extra_losses(scores_TE, chosen_TE, scale_TE, columns_TK, context)


class Visible:
    """The visible rows of a cohort's columns, taken when they are asked for."""

    def __init__(self, module: nn.Module, rows: Tensor) -> None:
        self._module, self._rows = module, rows

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.index_select(0, self._rows) if isinstance(value, Tensor) else value
