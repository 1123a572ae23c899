"""The exact state of a run on disk: written whole or not at all, and loaded without unpickling anything."""

from __future__ import annotations

import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmoe.errors import RunFailed, one_line

VERSION = 1
PREFIX, SUFFIX = "checkpoint-", ".pt"

# what `torch.load(weights_only=True)` takes; exact types, as a numpy number is a float too
_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, set, torch.Size)
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, *_SEQUENCES, *_MAPPINGS)


def save(folder: Path, number: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the folder's newest checkpoint and delete all but the last `keep`.

    Args:
        folder: the run's `state` folder.
        number: counts up with every checkpoint of the run.
        state: tensors and plain containers.
        keep: how many stay, at least one.

    Raises:
        RunFailed: the state holds something that could not be loaded again.
    """
    _refuse_others(state, "")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PREFIX}{number:06d}{SUFFIX}"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"version": VERSION, "number": number, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(folder)
    for old in sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))[: -max(1, keep)]:
        old.unlink()
    return path


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None when the run has none.

    Raises:
        RunFailed: there are checkpoints and none can be read.
    """
    paths = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"), reverse=True)
    reasons = []
    for path in paths:
        try:
            state = _read(path)
        except Exception as error:  # a damaged file fails in many ways; the one before it is tried
            reasons.append(f"{path.name}: {one_line(error)[:120]}")
            continue
        if state.get("version") != VERSION:
            raise RunFailed(f"{path}: expected checkpoint version {VERSION}, got {state.get('version')}")
        return state
    if paths:
        raise RunFailed(f"{folder}: no checkpoint can be read ({'; '.join(reasons)})")
    return None


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("not a checkpoint")
    return state


def _refuse_others(value: Any, where: str) -> None:
    """Found when it is saved, not when the run is resumed: a plugin's state may hold anything."""
    if isinstance(value, torch.Tensor):
        return
    if type(value) not in _PLAIN:
        raise RunFailed(
            f"checkpoint: {where}: expected tensors and plain containers (loading unpickles nothing), "
            f"got {type(value).__module__}.{type(value).__qualname__}"
        )
    if type(value) in _MAPPINGS:
        for key, item in value.items():
            _refuse_others(key, f"{where}.{key}".strip("."))
            _refuse_others(item, f"{where}.{key}".strip("."))
    elif type(value) in _SEQUENCES:
        for i, item in enumerate(value):
            _refuse_others(item, f"{where}.{i}")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seed_generators(seed: int) -> None:
    """Set every global random number generator; plugins may draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - it is the global one
    torch.manual_seed(seed)


def generators() -> dict[str, Any]:
    """The state of every global random number generator, as plain containers."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - it is the global one
    version, internal, following = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), gauss],
        "python": [version, list(internal), following],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    """Set every global random number generator to what `generators` gave."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
