"""Runs without their pictures, which take most of a small run's second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmoe.tracking import layout
from cmoe.tracking.files import write_atomic
from cmoe.tracking.tracker import Tracker


class _Described:
    """In place of the module of figures: each function gives what it was asked to draw, as text."""

    def __getattr__(self, name: str) -> Callable[..., str]:
        return lambda *arguments: f"{name}{arguments!r}"


def _figure(tracker: Tracker, name: str, text: Any) -> Path:
    path = tracker.run_dir / "figures" / f"{name}.png"
    write_atomic(path, text.encode())
    tracker.artifact(path, "figures")
    return path


def undrawn(patch: Callable[[Any, str, Any], object]) -> None:
    """Write what a picture would show instead of drawing it; the files and their names stay the same.

    Args:
        patch: `setattr`, or that of pytest's `monkeypatch`.
    """
    patch(layout, "figures", _Described())
    patch(Tracker, "figure", _figure)
