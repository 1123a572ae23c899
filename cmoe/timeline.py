"""What happened to the experts, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timeline:
    """Changes of experts in the order they happened.

    Attributes:
        events: mappings with `kind` ('added', 'frozen', 'removed'), `layer`, `experts` (ids), `experience`.
    """

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, layer: str, experts: Sequence[int], experience: int) -> None:
        """Note a change; one of no expert is none."""
        if experts:
            ids = [int(e) for e in experts]
            self.events.append({"kind": kind, "layer": layer, "experts": ids, "experience": int(experience)})

    def to_list(self) -> list[dict[str, Any]]:
        """Plain containers."""
        return [dict(e) for e in self.events]
