"""Routing by scores, in four parts that combine: score × select × weigh × capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmoe.config.types import Fraction, NonNegative
from cmoe.moe import losses
from cmoe.moe.routers.parts import capacity, dropout, weigh
from cmoe.moe.routers.parts.scores import Linear, Score
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.sparse import Sparse
from cmoe.moe.routing import RouteContext, Routing, replayed, score_dtype
from cmoe.moe.view import NONE, Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class Scored(Sparse):
    """Base of routers by score: a preset says how it scores, selects and weighs.

    The options here are every preset's, but for those without an effect on it: they are no field of its constructor.

    Options:
        capacity: each expert takes at most ⌈capacity · tokens · experts per token / experts⌉ tokens of a batch; 0 is no
            limit (dropless). Tokens left out get 0 from that expert.
        drop: who is left out: later tokens ('order'), lower weights ('weight', batch priority routing, Riquelme et al.
            2021), or any ('random').
        switch: weight of the load balance loss of Switch, E·Σ f·P.
        importance: weight of the squared coefficient of variation of the experts' summed weights.
        z: weight of the mean squared logsumexp of the scores.
        entropy: weight of the mean entropy of each token's distribution over experts.
        mutual_information: weight of minus the mutual information of task label and expert in a batch, which draws
            experts to tasks (Mod-Squad, Chen et al. 2023); 0 in a batch of one task.
        orthogonality: weight of the mean squared cosine between different visible experts' score vectors.
        expert_dropout: probability with which an expert is left out of a training batch, as if it were not there; as many
            stay as a token needs.
        init_std: standard deviation of the initial score vectors.
    """

    capacity: NonNegative = 0.0
    drop: Literal["order", "weight", "random"] = "order"
    switch: NonNegative = 0.0
    importance: NonNegative = 0.0
    z: NonNegative = 0.0
    entropy: NonNegative = 0.0
    mutual_information: NonNegative = 0.0
    orthogonality: NonNegative = 0.0
    expert_dropout: Fraction = 0.0
    init_std: NonNegative = 0.02

    exact_k = True
    fixed_k = True  # whether K of a batch is known before its tokens are

    def __post_init__(self) -> None:
        super().__post_init__()
        self.score = self.make_score()
        if self.capacity:
            # who else is in the batch decides who finds a place
            self.permutation_equivariant = self.drop == "weight"
            self.exact_k = False
            self.causal = self.causal and self.drop == "order" and self.fixed_k

    # -- what a preset defines -----------------------------------------------------------------------------------

    def check(self) -> None:
        super().check()
        if self.drop not in ("order", "weight", "random"):
            raise ValueError(f"drop: expected one of ('order', 'weight', 'random'), got {self.drop!r}")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout: expected at least 0 and less than 1, got {self.expert_dropout}")

    def least(self) -> int:
        """Experts that a token must be able to choose from; fewer are never left by expert dropout."""
        return int(getattr(self, "k", 1))

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

    def leave_out(self, scores_TE: Tensor, columns_TK: Tensor, context: RouteContext) -> Tensor | None:
        """Which of the chosen do not work though the others are weighed as if they did, (T, K) bool; only while training."""
        return None

    def learn_from(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> None:
        """Adjust what is learned without a gradient; called once for each training batch."""

    def mean_entropy(self, scores_TE: Tensor, valid: Tensor | None) -> Tensor:
        """What the option `entropy` weighs."""
        return losses.entropy_loss(scores_TE, valid)

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

    def _among(self, experts: ExpertView, context: RouteContext, training: bool) -> Columns:
        columns = super()._among(experts, context, training)
        if not (training and self.expert_dropout and context.replay is None):
            return columns
        stay = dropout.kept((len(columns),), self.expert_dropout, self.least(), context.generator).tolist()
        if all(stay):
            return columns
        return experts.slice(tuple(i for i, here in zip(columns.ids, stay, strict=True) if here), keep=False)

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
        """Replace a buffer of every visible expert that is not frozen.

        `new` gets a cohort's rows and where they stand in column order.
        """
        start = 0
        for (key, rows), ids in zip(columns.parts, columns.members, strict=True):
            own = slice(start, start + len(ids))
            start += len(ids)
            if key in columns.frozen:
                continue
            values = self.columns[key].get_buffer(name)
            if rows is None:
                values.copy_(new(values, own))
            else:
                index = columns.rows(key, rows, values.device)
                values.index_copy_(0, index, new(values.index_select(0, index), own))

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        scores_TE, h = self._scores(x_TD, context, columns)
        chosen_TE, scale_TE = self.perturb(x_TD, scores_TE, columns, context) if training else (scores_TE, None)
        left_TK: Tensor | None
        if context.replay is None:
            columns_TK, absent_TK = self.select(chosen_TE, columns, context, training)
            left_TK = self.leave_out(chosen_TE, columns_TK, context) if training else None
        else:
            columns_TK, absent_TK, left_TK = replayed(context.replay, columns)
        if context.valid is not None:
            invalid_T1 = ~context.valid.unsqueeze(1)
            absent_TK = invalid_T1.expand_as(columns_TK) if absent_TK is None else absent_TK | invalid_T1
        if training and context.replay is None:
            self.learn_from(scores_TE, columns_TK, absent_TK, columns)
        weights_TK = self.weigh(chosen_TE, columns_TK, absent_TK, columns)
        aux = self._losses(scores_TE, chosen_TE, scale_TE, weights_TK, columns_TK, absent_TK, columns, context) if training else {}  # fmt: skip
        dropped = None
        if self.capacity and context.replay is None:
            idle_TK = _either(absent_TK, left_TK)
            late_TK = self._late(columns_TK, idle_TK, weights_TK, len(columns), context)
            dropped = late_TK.sum(1)
            left_TK = _either(left_TK, late_TK)
        ids_TK, gone_TK = columns.to_ids(columns_TK), None
        if absent_TK is not None:
            ids_TK = ids_TK.masked_fill(absent_TK, NONE)
        if left_TK is not None:
            gone_TK = ids_TK.masked_fill(~left_TK, NONE)
            ids_TK, weights_TK = ids_TK.masked_fill(left_TK, NONE), weights_TK.masked_fill(left_TK, 0.0)
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
            left=gone_TK,
        )

    def active_parameters(self) -> int:
        # of scores and columns a score knows; whatever else a preset has works on every token
        rows = list(self.columns.values())
        known = [p for part in (self.score, *rows) for p in part.parameters()]
        rest = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in known)
        return rest + self.score.active(rows)

    def flops_per_token(self) -> int:
        rows = list(self.columns.values())
        return 2 * (self.active_parameters() - self.score.active(rows)) + self.score.flops(rows)

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
            aux["entropy"] = self.entropy * self.mean_entropy(scores_TE, valid)
        if self.mutual_information:
            probs_TE = scores_TE.softmax(-1)
            task_T = self._tasks(context, probs_TE)
            aux["mutual_information"] = self.mutual_information * losses.mutual_information_loss(
                probs_TE, task_T, valid
            )
        if self.orthogonality:
            seen = [self.rows_of(key, rows, columns, scores_TE.device) for key, rows in columns.parts]
            aux["orthogonality"] = self.orthogonality * losses.orthogonality_loss(
                [self.score.vectors(own) for own in seen]
            )
        return aux | self.extra_losses(scores_TE, chosen_TE, scale_TE, columns_TK, context)

    def _tasks(self, context: RouteContext, probs_TE: Tensor) -> Tensor:
        """The task label of each token.

        Raises:
            ValueError: there is none.
        """
        if context.task is None:
            raise ValueError("mutual_information: expected task labels in the context, got none")
        if isinstance(context.task, Tensor):
            return context.task
        return torch.full((len(probs_TE),), context.task, dtype=torch.int64, device=probs_TE.device)


def _either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second


class Visible:
    """The visible rows of a cohort's columns, taken when they are asked for."""

    def __init__(self, module: nn.Module, rows: Tensor) -> None:
        self._module, self._rows = module, rows

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.index_select(0, self._rows) if isinstance(value, Tensor) else value
