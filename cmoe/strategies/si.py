"""Synaptic intelligence."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, Positive
from cmoe.strategies.base import Segment
from cmoe.strategies.paths import Paths
from cmoe.strategies.quadratic import Weights


class SI(Paths):
    """Synaptic intelligence: weights that lowered the loss on their way stay (Zenke et al. 2017).

    https://arxiv.org/abs/1703.04200. ω is the sum over an experience's steps of −gradient · change, and at its end the
    importance Ω grows by ω / (Δ² + damping), with Δ the change over the whole experience. The penalty is ``strength`` ·
    Σ Ω (θ − θ*)². Stands before strategies that edit gradients, to see those of the losses.

    Options:
        strength: weight of the penalty (c of the paper).
        damping: ξ of the paper, in squared units of the weights.
        gradient: 'task' (of all losses but this penalty, before clipping), or 'whole' (penalty included, edited and
            clipped, as in the reference code of Dark Experience, whose ω is learning rate · gradient²: the same for
            plain SGD).
    """

    called: ClassVar[str] = "si"
    term: ClassVar[str] = "si"
    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        strength: NonNegative = 1.0,
        damping: Positive = 0.1,
        gradient: Literal["task", "whole"] = "task",
    ) -> None:
        super().__init__(strength)
        self.damping, self.whole = damping, gradient == "whole"
        self.path: Weights = {}
        self.start: Weights = {}

    def begin(self, name: str, value: Tensor) -> None:
        if name not in self.start:
            self.start[name] = value.clone()
            self.path[name] = torch.zeros_like(value)
        self.path[name] = self.path[name].to(value.device)

    def along(self, name: str, gradient: Tensor, step: Tensor, value: Tensor) -> None:
        self.path[name] -= gradient * step

    def after_experience(self, segment: Segment) -> None:
        now = self.present()
        new = {}
        for name, path in self.path.items():
            if name in now and now[name].shape == path.shape:
                moved = now[name] - self.start[name].to(path.device)
                new[name] = path.to(now[name].device) / (moved.square() + self.damping)
        self.consolidate(new)
        # below 0 the penalty had no lowest value
        self.importance = {n: f.clamp(min=0) for n, f in self.importance.items()}
        self.path, self.start = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "path": self.path, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.path, self.start = dict(state["path"]), dict(state["start"])
