"""Routers in which the task label takes part in the scores."""

from __future__ import annotations

from dataclasses import dataclass

from cmoe.config.types import PositiveInt
from cmoe.moe.routers.parts import scores
from cmoe.moe.routers.parts.scores import Score
from cmoe.moe.routers.topk import TopK


@dataclass(eq=False, repr=False, kw_only=True)
class TaskEmbedding(TopK):
    """Task embedding: the score of an expert is a product with the token plus one with an embedding of the task.

    Kudugunta et al. 2021 (Task-MoE), https://arxiv.org/abs/2110.03742; with `alone` the task alone decides.

    Options:
        tasks: how many task labels there may be.
        rank: dimensions of the embedding.
        alone: leave the token out of the score.
    """

    tasks: PositiveInt = 64
    rank: PositiveInt = 32
    alone: bool = False

    needs = frozenset({"task"})

    def make_score(self) -> Score:
        return scores.Task(self.dim, self.tasks, self.rank, self.alone, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise in ("shazeer", "jitter"):
            raise ValueError(f"task_embedding: noise: expected 'none' or 'gaussian', got {self.noise!r}")


@dataclass(eq=False, repr=False, kw_only=True)
class PerTask(TopK):
    """A router per task: each task has a linear router of its own over the shared experts.

    Ma et al. 2018 (MMoE); Fan et al. 2022 (M3ViT), https://arxiv.org/abs/2210.14793.

    Options:
        tasks: how many task labels there may be.
    """

    tasks: PositiveInt = 16

    needs = frozenset({"task"})

    def make_score(self) -> Score:
        return scores.PerTask(self.dim, self.tasks, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("per_task: noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")
