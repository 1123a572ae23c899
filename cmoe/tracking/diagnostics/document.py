"""What a row says of a run's experts, as a file beside the row: figures can be drawn anew and metrics added later.

A document is what `cmoe.diagnosis.diagnose` returns, in plain containers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmoe.tracking.files import read_json, write_atomic

Document = dict[str, Any]


def save(folder: Path, document: Document) -> None:
    """Write a row's document durably."""
    write_atomic(_path(folder, document["row"]), (json.dumps(document, allow_nan=False) + "\n").encode())


def load(folder: Path, rows: Sequence[int]) -> list[Document]:
    """The documents of these rows, those that are there."""
    found = [read_json(_path(folder, row), None) for row in sorted(rows)]
    return [document for document in found if isinstance(document, dict)]


def _path(folder: Path, row: int) -> Path:
    return Path(folder) / f"diagnostics_{row:04d}.json"
