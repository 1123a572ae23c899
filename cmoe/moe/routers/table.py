"""The task table: the task label says which experts work.

Task-level routing as in Task-MoE (Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742) and DEMix (Gururangan et al.
2021, https://arxiv.org/abs/2108.05036): no score is computed and nothing is learned.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmoe.moe.routing import RouteContext, Router, Routing, UniformRouting, replayed, score_dtype
from cmoe.moe.view import NONE, ExpertView


class TaskTable(Router):
    """Task table: the experts assigned to a token's task label work on it, with equal weights.

    Assignments belong to the layer (`MoELayer.assign`), not to the router.

    Options:
        unassigned: what serves a task label without experts of its own: 'modulo' (expert number label mod n of the
            oldest n experts, which later additions never change), 'latest' (the experts of the task assigned last;
            before any assignment as 'modulo'), or 'error'.
    """

    causal = True
    permutation_equivariant = True
    exact_k = False  # tasks may have different numbers of experts
    isolatable = True
    needs: frozenset[str] = frozenset({"task"})

    def __init__(self, dim: int, unassigned: Literal["modulo", "latest", "error"] = "modulo") -> None:
        super().__init__(dim)
        if unassigned not in ("modulo", "latest", "error"):
            raise ValueError(f"task_table: unassigned: expected 'modulo', 'latest' or 'error', got {unassigned!r}")
        self.unassigned = unassigned

    def experts_per_token(self, experts: ExpertView) -> int:
        return max((len(ids) for ids in experts.tasks.values()), default=1)

    def experts_of(self, task: int, experts: ExpertView, visible: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Ids of the experts that work for a task label.

        Raises:
            ValueError: the label is negative, none is assigned and `unassigned` is 'error', or none of them is visible.
        """
        if task < 0:
            raise ValueError(f"task_table: expected task labels from 0, got {task}")
        ids = experts.tasks.get(task)
        if ids is None:
            if self.unassigned == "error":
                raise ValueError(f"task_table: no expert is assigned to task {task}; assigned: {sorted(experts.tasks)}")
            if self.unassigned == "latest" and experts.tasks:
                ids = next(reversed(experts.tasks.values()))
            else:
                ids = (experts.first[task % len(experts.first)],)
        if visible is not None:
            ids = tuple(expert for expert in ids if expert in visible)
            if not ids:
                raise ValueError(f"task_table: no expert of task {task} is visible; visible: {list(visible)}")
        return ids

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        task = context.task
        if context.replay is not None:
            *_, left_TK = replayed(context.replay, experts.slice(context.visible))
            return self._equal(context.replay.masked_fill(left_TK, NONE), x_TD, context, experts)
        if isinstance(task, int):
            ids = self.experts_of(task, experts, context.visible)
            return UniformRouting(ids, x_TD, context.valid, experts.ids)
        if task is None:
            raise ValueError("task_table: expected a task label in the context, got none")
        # a table of the labels that occur, with a row of -1 where none does
        chosen = {label: self.experts_of(label, experts, context.visible) for label in task.unique().tolist()}
        k = max((len(ids) for ids in chosen.values()), default=1)
        rows = [[NONE] * k for _ in range(max(chosen, default=0) + 1)]
        for label, ids in chosen.items():
            rows[label][: len(ids)] = ids
        table = torch.tensor(rows, dtype=torch.int64, device=task.device)
        return self._equal(table.index_select(0, task.to(torch.int64)), x_TD, context, experts)

    def _equal(self, ids_TK: Tensor, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        if context.valid is not None:
            ids_TK = ids_TK.masked_fill(~context.valid.unsqueeze(1), NONE)
        present_TK = (ids_TK != NONE).to(score_dtype(x_TD.dtype))
        weights_TK = present_TK / present_TK.sum(1, keepdim=True).clamp(min=1.0)
        return Routing(ids=ids_TK, weights=weights_TK, columns=experts.ids, valid=context.valid)
