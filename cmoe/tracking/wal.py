"""The write-ahead log: everything that MLflow shall get is first a line in a local file, with its time stamp.

A checkpoint stores the log's length; a resumed run cuts the log back to that length and writes the same lines again.
Only lines before the length of the last durable checkpoint are *committed* and may be delivered, so no step is ever
logged twice. Where a run falls back behind lines that were delivered already (the checkpoint before the last, or a run
that goes on after its end), those lines are kept aside as *ghosts* and lend their time stamps to the lines that replace
them: MLflow keeps one of two metrics that agree in name, step, value and time stamp.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

WALL_CLOCK = "time/"  # metrics under this prefix are not reproducible: a ghost's value stands


class WriteAheadLog:
    """An append-only file of JSON lines `{"t": milliseconds, "kind": …}`, written in batches.

    Kinds: metric (step, values), param (key, value), tag (key, value), artifact (path, folder), dataset (name, digest,
    context), status (value).

    Args:
        path: the file; made when first synced. A torn last line, left by a kill, is cut off.
        now: milliseconds since the epoch.
    """

    def __init__(self, path: Path, now: Callable[[], int]) -> None:
        self.path = Path(path)
        self._now = now
        self._buffer: list[bytes] = []
        for written in (self.path, self._ghost_path):
            if written.exists():
                _cut(written, whole_lines(written))
        self._ghosts = _read_ghosts(self._ghost_path)

    @property
    def _ghost_path(self) -> Path:
        return self.path.with_name("wal.ghosts.jsonl")

    def append(self, kind: str, **fields: Any) -> None:
        """Adds an entry in memory; `sync` makes it durable."""
        entry: Entry = {"t": self._now(), "kind": kind, **fields}
        if self._ghosts and kind == "metric":
            entry = self._as_delivered(entry)
        self._buffer.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def sync(self) -> int:
        """Makes all entries durable and returns the log's length in bytes, for the checkpoint."""
        data, self._buffer = b"".join(self._buffer), []
        if not data and self.path.exists():
            return self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def truncate(self, length: int, delivered: int = 0) -> None:
        """Cuts the log back to a checkpoint's length, and drops what was not synced.

        Args:
            length: bytes that stay.
            delivered: bytes that MLflow may have already; what lies between the two is kept as ghosts.

        Raises:
            ValueError: the log is shorter than the checkpoint says.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if length > size:
            raise ValueError(f"{self.path}: expected at least {length} bytes, found {size}")
        self._buffer = []
        if delivered > length:
            with open(self.path, "rb") as source, open(self._ghost_path, "ab") as target:
                source.seek(length)
                target.write(source.read(delivered - length))
                target.flush()
                os.fsync(target.fileno())
            self._ghosts = _read_ghosts(self._ghost_path)
        if length < size:
            _cut(self.path, length)

    def _as_delivered(self, entry: Entry) -> Entry:
        step, values = entry["step"], entry["values"]
        # an entry is one time stamp: it takes the ghost's when that had the same names
        ghost = self._ghosts.get((step, tuple(sorted(values))))
        if ghost is None:
            return entry
        values = {k: ghost["values"][k] if k.startswith(WALL_CLOCK) else v for k, v in values.items()}
        return {**entry, "t": ghost["t"], "values": values}


def read(path: Path, start: int, stop: int) -> Iterator[tuple[Entry, int]]:
    """The entries between two byte offsets, each with the offset just after it; a torn line ends them."""
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        while position < stop:
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield json.loads(line), position


def whole_lines(path: Path) -> int:
    """The length of a log without its torn last line."""
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
        return 0


def _cut(path: Path, length: int) -> None:
    if length < path.stat().st_size:
        os.truncate(path, length)


def _read_ghosts(path: Path) -> dict[tuple[int, tuple[str, ...]], Entry]:
    if not path.exists():
        return {}
    ghosts: dict[tuple[int, tuple[str, ...]], Entry] = {}
    for entry, _ in read(path, 0, path.stat().st_size):
        if entry["kind"] == "metric":
            ghosts.setdefault((entry["step"], tuple(sorted(entry["values"]))), entry)
    return ghosts
