"""Memory aware synapses."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.config.types import Count, NonNegative
from cmoe.learners.batch import Batch
from cmoe.strategies.base import Segment
from cmoe.strategies.quadratic import Quadratic
from cmoe.strategies.sample_gradients import mean_of_samples, of_many, of_one


class MAS(Quadratic):
    """Memory aware synapses: weights that the outputs are sensitive to stay (Aljundi et al. 2018).

    https://arxiv.org/abs/1711.09601. After an experience each weight's importance grows by the mean over samples of
    |∂ ‖f(x)‖² / ∂θ|, each sample on its own, without labels; f(x) are the logits that the task's loss sees, of a text
    their squares' mean over positions. The penalty is ``strength`` · Σ Ω (θ − θ*)².

    Options:
        strength: weight of the penalty (λ of the paper).
        samples: of each experience for the importances, evenly spread; 0 is all.
    """

    called: ClassVar[str] = "mas"
    term: ClassVar[str] = "mas"
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, strength: NonNegative = 1.0, samples: Count = 0) -> None:
        super().__init__(strength)
        self.samples = samples

    def after_experience(self, segment: Segment) -> None:
        self.consolidate(mean_of_samples(self.context, segment, self._many, self._one, self.samples))

    def _many(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        for n, g in of_many(self.context, self._length, named, x, y, task)[0].items():
            total[n] += g.abs().sum(0)

    def _one(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        for n, g in of_one(self.context, self._length, named, x, y, task)[0].items():
            total[n] += g.abs()

    def _length(self, logits: Tensor, batch: Batch) -> Tensor:
        """Squared Euclidean length of a sample's outputs."""
        selected, targets = self.context.objective.select(logits, batch)
        lengths = selected.square().sum(-1)
        if not self.context.stream.language:
            return lengths.sum()
        real = targets != PADDING
        return (lengths * real).sum() / real.sum().clamp(min=1)
