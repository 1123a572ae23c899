"""Softmax top-k routing, with the noise of Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538) as an option.

Top-k before the softmax is Mixtral's rule (Jiang et al. 2024, https://arxiv.org/abs/2401.04088), after it that of GShard
and Switch (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.moe import losses
from cmoe.moe.routing import RouteContext, Router, Routing, score_dtype
from cmoe.moe.view import NONE, Columns, ExpertView


class ScoreColumns(nn.Module):
    """The score vectors of one cohort: `weight` (n, D), and with noise `noise` (n, D)."""

    def __init__(self, n: int, dim: int, noise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, dim))
        self.noise = nn.Parameter(torch.zeros(n, dim)) if noise else None


class TopK(Router):
    """Softmax top-k: each token goes to the k experts with the highest scores, optionally noisy while training.

    Scores are x·Wᵀ without bias, computed in at least float32. With fewer than k experts visible, all are used.

    Options:
        k: experts per token.
        order: top-k 'before' the softmax (weights are the softmax over the chosen k and sum to 1; with k = 1 the
            router then learns from the auxiliary losses only) or 'after' it (weights are the probabilities among all
            visible experts, with a sum of at most 1).
        noise: 'none', or 'shazeer': scores get N(0,1)·softplus(x·Wn) while training, with Wn learned.
        restrict: 'task' lets a token see only the experts assigned to its task (a task without any sees all; in a batch
            of several tasks each task's tokens are routed apart), 'none' all that the context lets it see.
        switch: weight of the load balance loss of Switch, E·Σ f·P.
        importance: weight of the squared coefficient of variation of the experts' summed weights.
        load: weight of the same for Shazeer's smooth load; needs noise.
        z: weight of the mean squared logsumexp of the scores.
        init_std: standard deviation of the initial score vectors.
    """

    causal: ClassVar[bool] = True
    permutation_equivariant: ClassVar[bool] = True  # noise aside, which is drawn per position
    exact_k: ClassVar[bool] = True
    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {"restrict": {"task": ("task",)}}
    isolatable: ClassVar[bool] = True  # with `restrict: task`, or with a context that says what is visible

    def __init__(
        self,
        dim: int,
        k: PositiveInt = 2,
        order: Literal["before", "after"] = "before",
        noise: Literal["none", "shazeer"] = "none",
        restrict: Literal["none", "task"] = "none",
        switch: NonNegative = 0.01,
        importance: NonNegative = 0.0,
        load: NonNegative = 0.0,
        z: NonNegative = 0.0,
        init_std: NonNegative = 0.02,
    ) -> None:
        super().__init__(dim)
        if k < 1:
            raise ValueError(f"topk: k: expected at least 1, got {k}")
        for name, value, known in (
            ("order", order, ("before", "after")),
            ("noise", noise, ("none", "shazeer")),
            ("restrict", restrict, ("none", "task")),
        ):
            if value not in known:
                raise ValueError(f"topk: {name}: expected one of {known}, got {value!r}")
        if load and noise == "none":
            raise ValueError("topk: load: the smooth load is defined for noise: shazeer only")
        self.k, self.order, self.noise, self.restrict = k, order, noise, restrict
        self.switch, self.importance, self.load, self.z = switch, importance, load, z
        self.init_std = init_std
        self.needs = frozenset({"task"}) if restrict == "task" else frozenset()

    def new_columns(self, n: int) -> nn.Module:
        return ScoreColumns(n, self.dim, self.noise == "shazeer")

    @torch.no_grad()
    def reset_columns(self, columns: nn.Module) -> None:
        assert isinstance(columns, ScoreColumns)
        columns.weight.normal_(0.0, self.init_std)
        if columns.noise is not None:
            columns.noise.zero_()  # softplus(0): some noise for all, as in the paper

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))

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
            raise ValueError("topk: restrict: task needs a task label in the context, got none")
        assigned = experts.tasks.get(context.task)
        if assigned is None or context.visible is None:
            return assigned or context.visible
        return tuple(expert for expert in assigned if expert in context.visible)

    def _by_label(self, x_TD: Tensor, context: RouteContext, task_T: Tensor, experts: ExpertView) -> Routing:
        """A batch of several tasks: each task's tokens are routed as if they came alone.

        Auxiliary losses are averaged with the shares of the tokens. There is no common score matrix, so no logits.
        """
        order_T, groups, aux = [], [], {}
        for label in task_T.unique().tolist():
            of_label = (task_T == label).nonzero().squeeze(1)
            fields = {
                name: value.index_select(0, of_label)
                for name in ("token_ids", "sequence", "position", "valid", "replay")
                if isinstance(value := getattr(context, name), Tensor)
            }
            routing = self(x_TD.index_select(0, of_label), replace(context, task=int(label), **fields), experts)
            for name, loss in routing.aux.items():
                aux[name] = aux.get(name, 0.0) + loss * (len(of_label) / len(x_TD))
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
        )

    def _scores(self, x_TD: Tensor, columns: Columns, name: str) -> Tensor:
        # One product per cohort: an old column's scores never depend on how many came later, and a frozen cohort
        # takes no part in the backward pass beyond the input's gradient.
        scores = []
        for key, rows in columns.parts:
            weight_ED = getattr(self.columns[key], name)
            if rows is not None:
                weight_ED = weight_ED.index_select(0, columns.rows(key, rows, x_TD.device))
            scores.append(F.linear(x_TD, weight_ED))
        scores_TE = scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)
        return scores_TE.to(score_dtype(x_TD.dtype))

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        logits_TE = chosen_TE = self._scores(x_TD, columns, "weight")
        scale_TE = None
        if training and self.noise == "shazeer":
            scale_TE = F.softplus(self._scores(x_TD, columns, "noise"))
            noise_TE = torch.randn(
                logits_TE.shape, generator=context.generator, device=x_TD.device, dtype=logits_TE.dtype
            )
            chosen_TE = logits_TE + noise_TE * scale_TE

        absent_TK = None
        if context.replay is None:
            columns_TK = chosen_TE.topk(min(self.k, len(columns)), dim=-1).indices
            ids_TK = columns.to_ids(columns_TK)
        else:
            columns.check(context.replay)
            ids_TK, columns_TK, absent_TK = context.replay, columns.to_columns(context.replay), context.replay == NONE
        if context.valid is not None:
            invalid_T1 = ~context.valid.unsqueeze(1)
            absent_TK = invalid_T1.expand_as(columns_TK) if absent_TK is None else absent_TK | invalid_T1
        weights_TK = self._weigh(chosen_TE, columns_TK, absent_TK)
        if absent_TK is not None:
            ids_TK = ids_TK.masked_fill(absent_TK, NONE)

        aux: dict[str, Tensor] = {}
        if training:
            n, valid = len(columns), context.valid
            if self.switch:
                aux["switch"] = self.switch * losses.switch_loss(logits_TE.softmax(-1), columns_TK, valid)
            if self.importance:
                aux["importance"] = self.importance * losses.importance_loss(weights_TK, columns_TK, n)
            if self.load and scale_TE is not None:
                k = columns_TK.shape[1]
                aux["load"] = self.load * losses.load_loss(logits_TE, chosen_TE, scale_TE, k, valid)
            if self.z:
                aux["z"] = self.z * losses.z_loss(logits_TE, valid)
        return Routing(ids=ids_TK, weights=weights_TK, logits=logits_TE, columns=columns.ids, aux=aux)

    def _weigh(self, chosen_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
        if self.order == "after":
            weights_TK = chosen_TE.softmax(-1).gather(1, columns_TK)
        else:
            picked_TK = chosen_TE.gather(1, columns_TK)
            if absent_TK is not None:
                # finite, so that a row without any expert has no NaN in its backward pass
                picked_TK = picked_TK.masked_fill(absent_TK, torch.finfo(picked_TK.dtype).min)
            weights_TK = picked_TK.softmax(-1)
        return weights_TK if absent_TK is None else weights_TK.masked_fill(absent_TK, 0.0)
