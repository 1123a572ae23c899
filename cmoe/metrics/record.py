"""What a run keeps of its evaluations: every test sample's prediction, from which all metrics are computed.

A *row* is one evaluation of the model, a *column* one experience's test set. Row i is the model after the segment whose
last experience is i, row -1 the freshly initialised model. Evaluations made while an experience is trained (every n
steps) are rows of that experience with a step. On disk each row is one safetensors file, written to a temporary name,
fsynced and renamed, so that a killed run never leaves half a row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from cmoe.errors import RunFailed

Kind = Literal["classification", "language"]
INITIAL = -1

_FIELDS: dict[str, tuple[str, ...]] = {
    "classification": ("pred", "confidence", "task_pred", "task_confidence"),
    "language": ("nll", "correct", "tokens"),
}
_DTYPES = {
    "pred": np.int32,
    "confidence": np.float32,
    "task_pred": np.int32,
    "task_confidence": np.float32,
    "nll": np.float32,
    "correct": np.int32,
    "tokens": np.int32,
}


@dataclass
class Column:
    """One experience's test set as one row saw it. Unset arrays were not evaluated; others become int32 or float32.

    Attributes:
        pred: (n,) predicted class, chosen among all (or all seen) classes; -1 is none.
        confidence: (n,) probability of that class.
        task_pred: (n,) class predicted when the task label is given (masked to the task's classes); -1 is none.
        task_confidence: (n,) its probability.
        nll: language modelling: (n,) negative log-likelihood of each sequence, a sum in nats.
        correct: (n,) number of bytes predicted right.
        tokens: (n,) number of bytes predicted.
    """

    pred: NDArray | None = None
    confidence: NDArray | None = None
    task_pred: NDArray | None = None
    task_confidence: NDArray | None = None
    nll: NDArray | None = None
    correct: NDArray | None = None
    tokens: NDArray | None = None

    def __post_init__(self) -> None:
        sizes = set()
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is not None:
                value = np.ascontiguousarray(value, dtype=dtype)
                assert value.ndim == 1, f"{name} must have one dimension, got {value.shape}"
                setattr(self, name, value)
                sizes.add(len(value))
        assert len(sizes) <= 1, f"the arrays of a column must be equally long, got {sorted(sizes)}"

    def arrays(self) -> dict[str, NDArray]:
        """The arrays that are set, by name."""
        return {name: getattr(self, name) for name in _DTYPES if getattr(self, name) is not None}


@dataclass
class Row:
    """One evaluation: `columns` by experience index; a missing column was not evaluated."""

    index: int
    columns: dict[int, Column]
    step: int | None = None


@dataclass
class Record:
    """All evaluations of a run.

    Attributes:
        kind: 'classification' or 'language'.
        names: of the experiences.
        classes: the classes of each experience; empty tuples for language modelling.
        targets: (n_j,) true classes of each experience's test set; for language modelling (n_j,) bytes per sequence.
        rows: by experience index, -1 for the initial model.
        within: evaluations made while an experience was trained, in order.
    """

    kind: Kind
    names: list[str]
    classes: Sequence[Sequence[int]]
    targets: Sequence[NDArray]
    rows: dict[int, Row] = field(default_factory=dict)
    within: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind)
        assert len(self.names) == len(self.classes) == len(self.targets)
        self.classes = [tuple(int(c) for c in classes) for classes in self.classes]
        self.targets = [np.ascontiguousarray(t, dtype=np.int32) for t in self.targets]

    def __len__(self) -> int:
        """Number of experiences that are tested."""
        return len(self.targets)

    @property
    def last(self) -> int:
        """Index of the newest row; -1 when nothing was learned yet."""
        return max(self.rows, default=INITIAL)

    def add_row(self, index: int, columns: Mapping[int, Column], step: int | None = None) -> Row:
        """Adds the evaluation after experience `index` (-1: before the first), or within it at `step`.

        A row that is there already is replaced.
        """
        assert INITIAL <= index < len(self), f"row {index} of {len(self)} experiences"
        for j, column in columns.items():
            assert 0 <= j < len(self), f"column {j} of {len(self)} experiences"
            for name, values in column.arrays().items():
                assert name in _FIELDS[self.kind], f"{name} in a record of kind {self.kind}"
                assert len(values) == len(self.targets[j]), f"column {j}: {len(values)} of {len(self.targets[j])}"
        row = Row(index, dict(sorted(columns.items())), step)
        if step is None:
            self.rows[index] = row
            self.rows = dict(sorted(self.rows.items()))
        else:
            self.within = [r for r in self.within if (r.index, r.step) != (index, step)] + [row]
            self.within.sort(key=lambda r: (r.index, r.step or 0))
        return row

    def save_targets(self, directory: Path) -> None:
        """Writes what does not change: kind, names, classes and targets."""
        about = {"kind": self.kind, "names": self.names, "classes": [list(c) for c in self.classes]}
        tensors = {f"{j:04d}": t for j, t in enumerate(self.targets)}
        _write(Path(directory) / "targets.safetensors", tensors, about)

    def save_row(self, directory: Path, index: int, step: int | None = None) -> Path:
        """Writes one row durably and returns its path."""
        row = self.rows[index] if step is None else next(r for r in self.within if (r.index, r.step) == (index, step))
        tensors = {f"{j:04d}/{name}": a for j, column in row.columns.items() for name, a in column.arrays().items()}
        path = Path(directory) / _file(index, step)
        _write(path, tensors, {"index": index, "step": step, "columns": list(row.columns)})
        return path

    @classmethod
    def load(cls, directory: Path, rows: int | None = None, step: int | None = None) -> Record:
        """Reads a record.

        Args:
            rows: keep only rows with an index below this (a resumed run evaluates the later ones again); None keeps all.
            step: of the evaluations within experience `rows`, keep those up to this step; None keeps none of them.

        Raises:
            RunFailed: a file is missing or damaged.
        """
        directory = Path(directory)
        tensors, about = _read(directory / "targets.safetensors")
        record = cls(
            cast(Kind, about["kind"]), list(about["names"]), about["classes"], [tensors[k] for k in sorted(tensors)]
        )
        for path in sorted(directory.glob("row_*.safetensors")):
            index, at = _parse(path.name)
            if index is None or (rows is not None and not _kept(index, at, rows, step)):
                continue
            tensors, about = _read(path)
            columns: dict[int, dict[str, NDArray]] = {int(j): {} for j in about["columns"]}
            for key, value in tensors.items():
                j, name = key.split("/")
                columns[int(j)][name] = value
            record.add_row(index, {j: Column(**arrays) for j, arrays in columns.items()}, at)
        return record


def _kept(index: int, at: int | None, rows: int, step: int | None) -> bool:
    return index < rows or (index == rows and at is not None and step is not None and at <= step)


def _file(index: int, step: int | None) -> str:
    name = "row_init" if index == INITIAL else f"row_{index:04d}"
    return f"{name}.safetensors" if step is None else f"{name}_step_{step:09d}.safetensors"


def _parse(name: str) -> tuple[int | None, int | None]:
    found = re.fullmatch(r"row_(init|\d+)(?:_step_(\d+))?\.safetensors", name)
    if not found:
        return None, None
    index, step = found.groups()
    return (INITIAL if index == "init" else int(index)), (None if step is None else int(step))


def _write(path: Path, tensors: Mapping[str, NDArray], about: Mapping[str, object]) -> None:
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    # one metadata entry: safetensors orders several at random, and equal runs shall give equal files
    data = save(dict(tensors), metadata={"cmoe": json.dumps(about, sort_keys=True)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> tuple[dict[str, NDArray], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["cmoe"])
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunFailed(f"{path}: expected a row of recorded predictions, cannot read it ({error})") from error
