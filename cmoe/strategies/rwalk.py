"""Riemannian walk."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, Positive, PositiveInt, Probability
from cmoe.strategies.base import Segment
from cmoe.strategies.paths import Paths
from cmoe.strategies.quadratic import Weights


class RWalk(Paths):
    """Riemannian walk: a running Fisher and a score of each weight's path hold it (Chaudhry et al. 2018).

    https://arxiv.org/abs/1801.10112, without its memory of samples (put `replay` beside it). At each step the Fisher is
    alpha · squared gradient of the batch's loss + (1 − alpha) · the one before. Every `interval` steps the score grows
    by what the weight lowered the loss, Σ −gradient · change, over ½ F · change² + damping. After an experience scores
    below 0 count as 0, and are averaged with those of the experiences before. The penalty is ``strength`` ·
    Σ (F + s) (θ − θ*)². Stands before strategies that edit gradients, to see those of the losses.

    Options:
        strength: weight of the penalty (λ of the paper).
        alpha: weight of the newest squared gradient.
        interval: steps between two updates of the scores (Δt of the paper).
        damping: keeps the scores of weights that hardly move finite (ε of the paper).
        normalise: divide the Fisher, and the scores, by the greatest of all weights.
    """

    called: ClassVar[str] = "rwalk"
    term: ClassVar[str] = "rwalk"
    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        strength: NonNegative = 1.0,
        alpha: Probability = 0.9,
        interval: PositiveInt = 10,
        damping: Positive = 0.1,
        normalise: bool = True,
    ) -> None:
        super().__init__(strength)
        self.alpha, self.interval, self.damping, self.normalise = alpha, interval, damping, normalise
        self.fisher: Weights = {}
        self.lowered: Weights = {}  # in this interval
        self.origin: Weights = {}  # values at its beginning
        self.steps: dict[str, int] = {}
        self.score: Weights = {}  # in this experience
        self.scores: Weights = {}  # of the experiences before

    def begin(self, name: str, value: Tensor) -> None:
        if name not in self.origin:
            self.origin[name] = value.clone()
            self.lowered[name] = torch.zeros_like(value)
            self.score[name] = torch.zeros_like(value)
            self.steps[name] = 0
        if name in self.fisher and self.fisher[name].shape != value.shape:
            del self.fisher[name]
        for held in (self.fisher, self.origin, self.lowered, self.score):
            if name in held:
                held[name] = held[name].to(value.device)

    def along(self, name: str, gradient: Tensor, step: Tensor, value: Tensor) -> None:
        new, old = gradient.square(), self.fisher.get(name)
        self.fisher[name] = new if old is None else self.alpha * new + (1 - self.alpha) * old
        self.lowered[name] -= gradient * step
        self.steps[name] += 1
        if self.steps[name] == self.interval:
            self._end_interval(name, value)

    def _end_interval(self, name: str, value: Tensor) -> None:
        """Add to the score what the steps since the last time are worth."""
        distance = 0.5 * self.fisher[name] * (value - self.origin[name]).square()
        self.score[name] += self.lowered[name] / (distance + self.damping)
        self.lowered[name], self.origin[name] = torch.zeros_like(value), value.clone()
        self.steps[name] = 0

    def after_experience(self, segment: Segment) -> None:
        now = self.present()
        for name, score in self.score.items():
            if name not in now or now[name].shape != score.shape:
                continue
            if self.steps[name]:
                self._end_interval(name, now[name])
            old = self.scores.get(name)
            gained = score.clamp(min=0)
            averaged = old is not None and old.shape == gained.shape
            self.scores[name] = (old.to(gained.device) + gained) / 2 if old is not None and averaged else gained
        self.fisher, self.scores = (
            {n: f for n, f in held.items() if n in now and now[n].shape == f.shape}
            for held in (self.fisher, self.scores)
        )
        fisher, scores = self._scaled(self.fisher), self._scaled(self.scores)
        # each time anew, not added up: both are running figures already
        self.importance = {n: f + scores[n] for n, f in fisher.items() if n in scores}
        self.consolidate({}, 1.0)
        self.lowered, self.origin, self.steps, self.score = {}, {}, {}, {}

    def _scaled(self, held: Weights) -> Weights:
        most = max((float(f.max()) for f in held.values() if f.numel()), default=0.0)
        return {n: f / most for n, f in held.items()} if self.normalise and most > 0 else held

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{name: getattr(self, name) for name in HELD}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in HELD:
            setattr(self, name, dict(state[name]))


HELD = ("fisher", "lowered", "origin", "steps", "score", "scores")
