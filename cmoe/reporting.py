"""What a run tells while it goes on; the command line draws it, a library use may ignore it."""

from __future__ import annotations

from typing import Any


class Reporter:
    """Every call does nothing until it is overridden."""

    def started(self, run_id: str, facts: dict[str, Any]) -> None:
        """The run begins or goes on."""

    def segment(self, number: int, total: int, name: str, resumed: bool) -> None:
        """A segment begins."""

    def progress(self, phase: str, step: int, steps: int, loss: float | None) -> None:
        """A chunk is done."""

    def row(self, row: int, values: dict[str, float]) -> None:
        """A row of the matrix was evaluated."""

    def note(self, text: str) -> None:
        """Something that the user should know, once."""

    def finished(self, facts: dict[str, Any]) -> None:
        """The run is complete."""
