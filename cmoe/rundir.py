"""The folder of a run: its name, its facts, who works on it, and how it is found again."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cmoe.errors import UserError, nearest

RUNS = "runs"


class RunFolder:
    """`mlruns/runs/<run id>` with `run.json`, `rows/`, `state/`, `wal.jsonl`, `figures/`, and `config.yaml`.

    What the run computes is the configuration in `run.json`, which changes whole or not at all; `config.yaml` is its
    copy for people and for `cmoe run`.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def id(self) -> str:
        """The run's id, which is the folder's name."""
        return self.path.name

    @property
    def rows(self) -> Path:
        """Recorded predictions."""
        return self.path / "rows"

    @property
    def state(self) -> Path:
        """Checkpoints."""
        return self.path / "state"

    @property
    def wal(self) -> Path:
        """The write-ahead log of everything tracked."""
        return self.path / "wal.jsonl"

    @property
    def figures(self) -> Path:
        """Pictures and tables."""
        return self.path / "figures"

    def facts(self) -> dict[str, Any]:
        """What `run.json` says."""
        try:
            return json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path}: expected a run's folder, but run.json is not there") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path / 'run.json'}: expected JSON ({error})") from None

    def update(self, **facts: Any) -> dict[str, Any]:
        """Change facts in `run.json`, whole or not at all; returns all of them."""
        path = self.path / "run.json"
        known = self.facts() if path.exists() else {}
        known.update(facts)
        write_whole(path, json.dumps(known, indent=1, allow_nan=False) + "\n")
        return known

    @contextlib.contextmanager
    def working(self) -> Generator[None]:
        """Hold the run against a second process that would work on it.

        Raises:
            UserError: another process works on it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"run {self.id}: another process is working on it") from None
        try:
            yield
        finally:
            lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a text file by a temporary one beside it, so that a reader sees the old or the new, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def now() -> str:
    """The present time in UTC, ISO 8601; runs are ordered by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def slug(text: str) -> str:
    """`text` as part of a file name, of at most 60 characters."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:60] or "run"


def writable(root: Path) -> None:
    """Make the folder of run output.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        (root / RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(root, error) from error


def _refused(root: Path, error: OSError) -> UserError:
    reason = f"'{root}' ({error.strerror or error})"
    return UserError(f"tracking.root: expected a folder that can be written, got {reason}")


def create(root: Path, experiment: str, label: str, seed: int, config_hash: str) -> RunFolder:
    """A new folder for a run; a second run of the same configuration gets a number of its own.

    Raises:
        UserError: nothing can be written under `root`.
    """
    base = f"{slug(experiment)}-{slug(label)}-s{seed}-{config_hash[:6]}"
    number = 1
    writable(root)
    try:
        while True:
            path = root / RUNS / (base if number == 1 else f"{base}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            return RunFolder(path)
    except OSError as error:
        raise _refused(root, error) from error


def runs(root: Path) -> list[RunFolder]:
    """All runs under `root`, oldest first."""
    found = []
    for path in (root / RUNS).glob("*/run.json"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_ctime_ns, path.parent))
    created = {p: _created(p) for _, p in found}
    return [RunFolder(p) for _, p in sorted(found, key=lambda f: (created[f[1]], f[1].name))]


def _created(path: Path) -> str:
    try:
        return str(json.loads((path / "run.json").read_text()).get("created", ""))
    except (OSError, json.JSONDecodeError):
        return ""


def find(root: Path, name: str) -> RunFolder:
    """A run by its id, the beginning of its id, its folder, or 'last'.

    Raises:
        UserError: there is no such run, or more than one.
    """
    if name and (Path(name) / "run.json").is_file():
        return RunFolder(Path(os.path.abspath(name)))
    known = runs(root)
    if not known:
        raise UserError(f"no runs in {root}; start one with: cmoe run quickstart")
    if name == "last":
        return known[-1]
    matching = [r for r in known if r.id == name] or [r for r in known if r.id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise UserError(
            f"run '{name}': expected one run, {len(matching)} begin so: {', '.join(r.id for r in matching[:4])}"
        )
    raise UserError(f"run '{name}': not in {root}{nearest(name, [r.id for r in known])}")
