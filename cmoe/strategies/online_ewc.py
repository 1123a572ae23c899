"""Online elastic weight consolidation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from cmoe.config.types import NonNegative, Probability
from cmoe.strategies import fisher
from cmoe.strategies.base import Segment
from cmoe.strategies.quadratic import Quadratic
from cmoe.strategies.sample_gradients import mean_of_samples


class OnlineEWC(Quadratic):
    """Online EWC: one running diagonal Fisher holds weights near their last values (Schwarz et al. 2018).

    After an experience the Fisher is the mean over its samples of a weighted squared gradient of log p(y|x), each
    sample on its own; running Fisher = gamma · running + new; the penalty is ``strength`` · Σ F (θ − θ*)², without a
    factor ½.

    Options:
        strength: weight of the penalty; not portable between estimates of the Fisher.
        gamma: decay of the running Fisher at each experience.
        fisher: 'empirical' (true label), or 'confidence' (true label, each sample's squared gradient weighted by its
            p(y|x), as in the reference code of Dark Experience).
    """

    called: ClassVar[str] = "online_ewc"
    term: ClassVar[str] = "ewc"
    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        strength: NonNegative = 1.0,
        gamma: Probability = 1.0,
        fisher: Literal["empirical", "confidence"] = "empirical",
    ) -> None:
        super().__init__(strength)
        self.gamma, self.fisher = gamma, fisher

    def after_experience(self, segment: Segment) -> None:
        self.consolidate(self._fisher(segment), self.gamma)

    def _fisher(self, segment: Segment) -> dict[str, Tensor]:
        """The Fisher's diagonal by parameter name, over the segment's training samples."""
        return mean_of_samples(self.context, segment, self._vectorised, self._single)

    def _vectorised(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        fisher.add_many(self.context, self.fisher, total, named, x, y, task)

    def _single(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        fisher.add_one(self.context, self.fisher, total, named, x, y, task)
