"""Bytes with a different step in every domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cmoe.streams.task import Modality, Task


@dataclass
class TinyBytes(Task):
    """Three domains that count up in steps of 1, 2 and 3."""

    modality: ClassVar[Modality] = "bytes"
    scenarios: ClassVar[tuple[str, ...]] = ("domain", "task", "joint", "online")

    def benchmark(self, data: Any, seed: int) -> Any:
        from cmoe.streams.builders import language
        from cmoe.streams.text import BYTE_VOCABULARY, windows

        def text(step: int, n: int) -> bytes:
            return bytes(i * step % 50 + 40 for i in range(n))

        domains = {
            f"step {s}": (windows(text(s, 400), 12), windows(text(s, 30), 12), windows(text(s, 50), 12))
            for s in (1, 2, 3)
        }
        return language(self, seed, domains=domains, vocabulary=BYTE_VOCABULARY)
