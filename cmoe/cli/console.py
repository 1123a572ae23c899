"""A run's progress on the terminal, or as plain lines where there is none."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from cmoe.reporting import Reporter

HEADLINES = ("class_il/acc_macro", "task_il/acc_macro", "bits_per_byte/bpb_macro", "next_byte_accuracy/acc_macro")


def headline(values: dict[str, float]) -> str:
    """The mean accuracies of a row in words."""
    parts = []
    for name in HEADLINES:
        if values.get(name) is not None:
            view = name.split("/")[0]
            parts.append(
                f"{view} {values[name]:.3f}" if view == "bits_per_byte" else f"{view} {100 * values[name]:.1f} %"
            )
    return ", ".join(parts)


class Console(Reporter):
    """Draws bars on standard error for one run or several; lines only where it is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.rich = Rich(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=self.rich, transient=True, disable=not self.live)
        self.tasks: dict[str, Any] = {}
        self.segments: dict[str, tuple[int, int, str]] = {}
        self.name = "run"

    @contextmanager
    def drawing(self) -> Generator[None]:
        """While this is open the bars move."""
        with self.bars:
            yield

    def line(self, text: str) -> None:
        """A line above the bars."""
        if self.live:
            self.rich.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def on(self, name: str, event: str, arguments: tuple[Any, ...]) -> None:
        """A reporter's call for the run of that name."""
        before, self.name = self.name, name
        getattr(self, event)(*arguments)
        self.name = before

    def started(self, run_id: str, facts: dict[str, Any]) -> None:
        size = f", {facts['parameters']:,} parameters" if "parameters" in facts else ""
        self.line(
            f"[{self.name}] run {run_id}: {facts.get('segments', '?')} experiences{size}, {facts.get('device', '')}"
        )

    def segment(self, number: int, total: int, name: str, resumed: bool) -> None:
        self.segments[self.name] = (number, total, name)
        if self.name not in self.tasks:
            self.tasks[self.name] = self.bars.add_task(self.name, total=1.0, state="")
        self._move(0.0, f"experience {number + 1}/{total}")

    def progress(self, phase: str, step: int, steps: int, loss: float | None) -> None:
        number, total, _ = self.segments.get(self.name, (0, 1, ""))
        lost = "" if loss is None else f", loss {loss:.3f}"
        self._move(step / max(1, steps), f"experience {number + 1}/{total}, {phase} {step}/{steps}{lost}")

    def _move(self, share: float, state: str) -> None:
        number, total, _ = self.segments[self.name]
        self.bars.update(self.tasks[self.name], completed=(number + share) / max(1, total), state=state)

    def row(self, row: int, values: dict[str, float]) -> None:
        number, total, name = self.segments.get(self.name, (0, 1, ""))
        words = headline(values)
        self.line(f"[{self.name}] experience {number + 1}/{total} ({name}): {words or 'trained'}")

    def note(self, text: str) -> None:
        self.line(f"[{self.name}] {text}")

    def skipped(self) -> None:
        """A sweep found the run finished."""
        self.line(f"[{self.name}] finished before, skipped")

    def ended(self) -> None:
        """A sweep's run ended."""
        if self.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(self.name))


class StopFlag:
    """Ctrl-C asks for a clean stop; a second one ends at once."""

    def __init__(self, line: Any) -> None:
        self.asked = False
        self.line = line

    def __call__(self) -> bool:
        return self.asked

    def _handle(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt("interrupted at once; `cmoe resume` goes on from the last checkpoint")
        self.asked = True
        self.line("stopping after this chunk, the state will be saved (Ctrl-C again ends at once)")

    @contextmanager
    def installed(self) -> Generator[StopFlag]:
        """While this is open Ctrl-C and SIGTERM set the flag."""
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
