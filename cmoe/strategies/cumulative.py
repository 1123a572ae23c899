"""Training on all data seen so far."""

from __future__ import annotations

from typing import ClassVar

from cmoe.errors import UserError
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.streams import Experience


class Cumulative(Strategy):
    """Trains each time on all experiences so far: replay with an unlimited buffer.

    Options:
        restart: begin each experience from fresh weights instead of going on.
    """

    owns_data: ClassVar[bool] = True

    def __init__(self, restart: bool = False) -> None:
        self.restart = restart

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.restart and any(s["name"] == "expand" for s in context.options["strategy"]):
            raise UserError("strategy.cumulative: restart beside 'expand' would draw its frozen experts anew")

    def data(self, segment: Segment) -> list[Experience]:
        return self.context.stream.experiences[: segment.last + 1]

    def before_experience(self, segment: Segment) -> None:
        if self.restart and segment.number > 0:
            self.context.restart(f"restart {segment.number}")
