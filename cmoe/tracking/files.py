"""Small files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, fsyncs and renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """`write_atomic` of a JSON document."""
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, default: Any) -> Any:
    """A JSON document, or `default` where there is none or it is damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return default
