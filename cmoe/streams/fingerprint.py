"""One hash of everything that a stream's samples depend on."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmoe.streams.stream import Layout


class _Hash:
    """sha256 over named values; a tensor that occurs again is named, not read, again."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.seen: dict[tuple, int] = {}

    def add(self, name: str, value: Any) -> None:
        """Take in `value` under `name`."""
        self.sha.update(f"\n{name}:".encode())
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, (list, tuple)):
            self.sha.update(f"[{len(value)}".encode())
            for item in value:
                self.add("", item)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                self.add(str(key), value[key])
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "biuf":
                self._tensor(torch.from_numpy(np.ascontiguousarray(value)))
            else:
                self.add("array", value.tolist())
        elif value is None or isinstance(value, (bool, int, float, str)):
            self.sha.update(repr(value).encode())
        else:  # a transform or another small object: its class and its state
            self.sha.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())
            ours = type(value).__module__.startswith("cmoe.")  # whose private state is cached results
            state = getattr(value, "__dict__", {})
            self.add("state", {k: v for k, v in state.items() if not (ours and k.startswith("_"))})

    def _tensor(self, value: Tensor) -> None:
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if key in self.seen and value.numel():
            self.sha.update(f"again {self.seen[key]}".encode())
            return
        self.seen[key] = len(self.seen)
        self.sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.numel():
            self.sha.update(memoryview(value.detach().contiguous().view(-1).view(torch.uint8).numpy()))


def fingerprint(layout: Layout) -> str:
    """sha256 of data bytes, indices, labels and definition, in hex."""
    h = _Hash()
    for name in ("modality", "scenario", "segments", "class_names", "vocabulary", "transform"):
        h.add(name, getattr(layout, name))
    for e in layout.experiences:
        h.add("experience", [e.index, e.name, e.task_label, e.classes, e.parts])
        for name in ("train", "validation", "test"):
            split = getattr(e, name)
            h.add(name, [split.x, split.index, split.y])
    return h.sha.hexdigest()
