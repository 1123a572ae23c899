"""Training on everything at once: the upper baseline."""

from __future__ import annotations

from typing import ClassVar

from cmoe.strategies.base import Segment, Strategy


class Joint(Strategy):
    """Trains once on the union of all experiences; the matrix has one row."""

    owns_data: ClassVar[bool] = True
    extendable: ClassVar[bool] = False

    def segments(self, segments: list[Segment]) -> list[Segment]:
        return [Segment(0, tuple(e for segment in segments for e in segment.experiences))]
