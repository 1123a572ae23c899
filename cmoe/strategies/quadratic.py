"""What strategies share that hold weights near old values by a quadratic penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Phase, Segment, Strategy

Weights = dict[str, Tensor]


class Quadratic(Strategy):
    """Base of strategies whose loss gains ``strength`` · Σ importance · (θ − anchor)².

    Weights that are frozen, gone, or of another shape than when they were anchored are left out.

    Attributes:
        called: its name in a configuration, for figures.
        term: the name of its loss.
        importance: by parameter name.
        anchor: the values that weights are held near, by parameter name.

    Args:
        strength: weight of the penalty.
    """

    called: ClassVar[str]
    term: ClassVar[str]
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.importance: Weights = {}
        self.anchor: Weights = {}
        self._pairs: list[tuple[nn.Parameter, Tensor, Tensor]] | None = None

    def terms(self) -> list[tuple[Weights, Weights]]:
        """Importances and anchors, each pair a sum of its own."""
        return [(self.importance, self.anchor)] if self.importance else []

    def before_experience(self, segment: Segment) -> None:
        self._pairs = None

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        self._pairs = None

    def held(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Parameters with their importances and anchors, once for each term."""
        if self._pairs is None:
            self._pairs = [
                (p, importance[name].to(p.device, p.dtype), anchor[name].to(p.device))
                for importance, anchor in self.terms()
                for name, p in self.context.model.named_parameters()
                if p.requires_grad and name in importance and p.shape == anchor[name].shape
            ]
        return self._pairs

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if not self.terms():
            return {}
        penalty = [(f * (p - a).square()).sum() for p, f, a in self.held()]
        if not penalty:
            return {}
        return {self.term: self.strength * torch.stack(penalty).sum()}

    def consolidate(self, new: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Add importances to `decay` times those before, and hold weights near their present values from now on."""
        weights = dict(self.context.model.named_parameters())
        old = self.importance
        self.importance = {
            n: f + decay * old[n].to(f.device) if n in old and old[n].shape == f.shape else f for n, f in new.items()
        }
        for name, f in old.items():  # weights that are frozen now but may thaw
            if name not in self.importance and name in weights and weights[name].shape == f.shape:
                self.importance[name] = decay * f
        self.anchor = {n: weights[n].detach().clone() for n in self.importance}
        self._pairs = None

    def facts(self) -> dict[str, float]:
        return {f"{self.called}/bytes": float(_bytes(self.state_dict()))}

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance, "anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance, self.anchor = dict(state["importance"]), dict(state["anchor"])
        self._pairs = None


def _bytes(state: Any) -> int:
    """Of all tensors in plain containers."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(_bytes, state.values()))
    return sum(map(_bytes, state)) if isinstance(state, list | tuple) else 0
