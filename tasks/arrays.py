"""Anybody's arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cmoe.config.types import Count, Fraction
from cmoe.errors import UserError, nearest
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from pathlib import Path

    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder

KEYS = ("x", "y", "task", "x_train", "y_train", "task_train", "x_test", "y_test", "task_test")


@dataclass(kw_only=True)
class Arrays(Task):
    """Your own data: a .npz file with x and y, or x_train, y_train, x_test and y_test; optionally with task.

    x is (N, D) for vectors or (N, H, W), (N, C, H, W) or (N, H, W, C) for images (uint8 is divided by 255, floats stay
    as they are); y holds integer or string labels; task (task_train, task_test) says which experience a sample is of.

    Options:
        path: the .npz file, as given or below the data folder.
        experiences: in how many equal groups of classes the data comes; 0 takes the file's task array, or one
            experience for each class.
        test: share of each class that becomes the test set where the file has none.
    """

    modality: ClassVar[Modality] = "image"

    path: str
    experiences: Count = 0
    test: Fraction = 0.2

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        import numpy as np

        from cmoe.streams.builders import class_incremental, domain_incremental

        path = data.file(self.path)
        parts = self._parts(path, _load(path))
        names, codes = np.unique(np.concatenate([p[1] for p in parts]), return_inverse=True)
        for part, y in zip(parts, np.split(codes, [len(parts[0][1])]), strict=True):
            part[1] = y
        (x, y, task), (x_test, y_test, task_test) = parts
        kind: Modality = "vector" if x.ndim == 2 else "image"
        arguments: dict[str, Any] = {"class_names": [str(n) for n in names], "modality": kind}
        if task is None or self.experiences:
            number = self.experiences or len(names)
            if self.scenario == "domain" and not self.experiences:
                raise UserError("stream.experiences: expected how many, for the 'domain' scenario")
            return class_incremental(self, seed, train=(x, y), test=(x_test, y_test), experiences=number, **arguments)
        ids = np.unique(task)
        if task_test is None or set(np.unique(task_test)) != set(ids):
            raise UserError(f"{path}: the tasks of the training and test samples differ")
        titles = [f"task {i}" for i in ids]
        groups = [np.unique(y[task == i]).tolist() for i in ids]
        if self.scenario != "domain" and sum(map(len, groups)) == len(names):
            train, test = (x, y), (x_test, y_test)
            return class_incremental(self, seed, train=train, test=test, groups=groups, names=titles, **arguments)
        train, test = (
            [(x[task == i], y[task == i]) for i in ids],
            [(x_test[task_test == i], y_test[task_test == i]) for i in ids],
        )
        return domain_incremental(self, seed, train=train, test=test, names=titles, **arguments)

    def _parts(self, path: Path, found: dict[str, Any]) -> list[list[Any]]:
        """[x, y, task or None] of training and test samples, channels before rows."""
        import numpy as np
        import torch

        from cmoe.streams.arrays import hold_out

        unknown = sorted(found.keys() - set(KEYS))
        if unknown:
            raise UserError(f"{path}: '{unknown[0]}' is not one of {', '.join(KEYS)}{nearest(unknown[0], KEYS)}")
        split = any(name.endswith(("_train", "_test")) for name in found)
        needed = ("x_train", "y_train", "x_test", "y_test") if split else ("x", "y")
        lacking = [name for name in needed if name not in found]
        if lacking:
            raise UserError(f"{path}: no array '{lacking[0]}'; expected {', '.join(needed)}")
        for name, array in found.items():
            rows = len(found.get(name.replace("y", "x", 1).replace("task", "x", 1), array))
            if name[0] != "x" and (array.ndim != 1 or len(array) != rows):
                raise UserError(f"{path}: {name}: expected one value a sample ({rows}), got shape {array.shape}")
            if name[0] != "x" and array.dtype.kind not in "iuUSb":
                raise UserError(f"{path}: {name}: expected integers or strings, got {array.dtype}")
        if split:
            return [
                [_channels_first(found[f"x_{part}"]), found[f"y_{part}"], found.get(f"task_{part}")]
                for part in ("train", "test")
            ]
        x, y, task = _channels_first(found["x"]), found["y"], found.get("task")
        if not len(y):
            raise UserError(f"{path}: no samples")
        # every class of every task has its share in the test set
        _, cell = np.unique(
            y if task is None else np.stack((y.astype(str), task.astype(str))), axis=-1, return_inverse=True
        )
        fit, held = (rows.numpy() for rows in hold_out(torch.from_numpy(cell.reshape(-1)), self.test, "arrays test"))
        return [[x[rows], y[rows], None if task is None else task[rows]] for rows in (fit, held)]


def _load(path: Path) -> dict[str, Any]:
    """All arrays of the file; objects, which would have to be unpickled, are refused."""
    import zipfile
    import zlib

    import numpy as np

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a .npz file that can be read")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds Python objects" if "allow_pickle" in str(error) else "not a .npz file that can be read"
        raise UserError(f"{path}: {reason}; expected plain arrays saved with numpy.savez") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise UserError(f"{path}: {name}: expected one entry a sample, got a single value")
    return arrays


def _channels_first(x: Any) -> Any:
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return x.transpose(0, 3, 1, 2)
    return x
