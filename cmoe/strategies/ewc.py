"""Elastic weight consolidation with a term for each past experience."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from cmoe.config.types import Count, NonNegative
from cmoe.errors import UserError
from cmoe.strategies.base import Context, Segment
from cmoe.strategies.fisher import add_many, add_one
from cmoe.strategies.quadratic import Quadratic, Weights
from cmoe.strategies.sample_gradients import mean_of_samples


class EWC(Quadratic):
    """EWC: each past experience holds weights near its own solution by its own Fisher (Kirkpatrick et al. 2017).

    https://arxiv.org/abs/1612.00796. The penalty is ``strength`` · Σ over past experiences of Σ ½ F (θ − θ*)²; what is
    held grows with each. The Fisher is the mean over samples, each on its own, of squared gradients of log p(y|x): over
    the model's own distribution of y (exact, one backward pass for each output), or at the label (empirical).

    Options:
        strength: weight of the penalty (λ of the paper); not portable between estimates of the Fisher.
        fisher: 'exact' or 'empirical'; language modelling needs 'empirical'.
        samples: of each experience for the Fisher, evenly spread; 0 is all.
    """

    called: ClassVar[str] = "ewc"
    term: ClassVar[str] = "offline_ewc"  # 'ewc' is that of 'online_ewc'
    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        strength: NonNegative = 1.0,
        fisher: Literal["exact", "empirical"] = "exact",
        samples: Count = 0,
    ) -> None:
        super().__init__(strength)
        self.fisher, self.samples = fisher, samples
        self.past: list[tuple[Weights, Weights]] = []

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language and self.fisher == "exact":
            raise UserError("strategy.ewc.fisher: expected 'empirical' for language modelling, got 'exact'")

    def terms(self) -> list[tuple[Weights, Weights]]:
        return self.past

    def after_experience(self, segment: Segment) -> None:
        weights = dict(self.context.model.named_parameters())
        adds = (partial(add, self.context, self.fisher) for add in (add_many, add_one))
        new = mean_of_samples(self.context, segment, *adds, samples=self.samples)
        halves = {n: f / 2 for n, f in new.items()}
        self.past.append((halves, {n: weights[n].detach().clone() for n in halves}))
        self.past = [_those_of(weights, *each) for each in self.past]
        self._pairs = None

    def state_dict(self) -> dict[str, Any]:
        return {"past": [list(each) for each in self.past]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = [(dict(importance), dict(anchor)) for importance, anchor in state["past"]]
        self._pairs = None


def _those_of(weights: Mapping[str, Tensor], importance: Weights, anchor: Weights) -> tuple[Weights, Weights]:
    """A term without the weights that are gone."""
    kept = [n for n, a in anchor.items() if n in weights and weights[n].shape == a.shape]
    return {n: importance[n] for n in kept}, {n: anchor[n] for n in kept}
