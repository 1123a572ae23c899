"""Two passes with different experts that must agree."""

from __future__ import annotations

from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.config.types import NonNegative
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.moe import RouteContext, losses
from cmoe.moe.routing import score_dtype
from cmoe.strategies.base import Strategy


class Consistency(Strategy):
    """Consistency: each batch goes through the model twice, and both predictions should agree (THOR, Zuo et al. 2022).

    https://arxiv.org/abs/2110.04260. The loss gains that of the second pass, its routers' losses included, and ``alpha`` ·
    mean of ½ (KL(p‖q) + KL(q‖p)) of the two passes' predictions over the outputs that the task's loss sees. Meant for
    the router `random`, whose experts are drawn anew at each pass; also for noisy routers, expert dropout and dropout.
    A model that draws nothing predicts the same twice and learns the same as without, in twice the time.

    Options:
        alpha: weight of the divergence.
    """

    def __init__(self, alpha: NonNegative = 1.0) -> None:
        self.alpha = alpha

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        objective, language = self.context.objective, self.context.stream.language
        second = self.context.model(batch.x, RouteContext(task=batch.task, training=True))
        total = objective.loss(second.logits, batch)
        for value in second.auxiliary().values():
            total = total + value
        p, targets = objective.select(output.logits, batch)
        q, _ = objective.select(second.logits, batch)
        exact = score_dtype(p.dtype)
        divergence = losses.consistency_loss(p.to(exact), q.to(exact), targets != PADDING if language else None)
        return {"second_pass": total, "consistency": self.alpha * divergence}
