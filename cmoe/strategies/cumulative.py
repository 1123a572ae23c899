"""Training on all data seen so far."""

from __future__ import annotations

from typing import ClassVar

from cmoe.strategies.base import Segment, Strategy
from cmoe.streams import Experience


class Cumulative(Strategy):
    """Trains each time on all experiences so far: replay with an unlimited buffer.

    Options:
        restart: begin each experience from fresh weights instead of going on.
    """

    owns_data: ClassVar[bool] = True

    def __init__(self, restart: bool = False) -> None:
        self.restart = restart

    def data(self, segment: Segment) -> list[Experience]:
        return self.context.stream.experiences[: segment.last + 1]

    def before_experience(self, segment: Segment) -> None:
        if self.restart and segment.number > 0:
            fresh = self.context.fresh_model(f"restart {segment.number}")
            fresh.restore_structure(self.context.model.structure())
            self.context.model.load_state_dict(fresh.state_dict())
