"""From recorded predictions to the matrix R, the baseline b and the counts n, for each way of looking at a run.

`class_il` scores predictions made without the task label (in the domain scenario these are domain-incremental),
`task_il` those masked to the task's classes; for language modelling `bits_per_byte` (lower is better) and
`next_byte_accuracy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cmoe.metrics.record import INITIAL, Column, Record, Row
from cmoe.metrics.value import Array

VIEWS: dict[str, tuple[str, ...]] = {
    "classification": ("class_il", "task_il"),
    "language": ("bits_per_byte", "next_byte_accuracy"),
}


@dataclass(frozen=True)
class View:
    """One view of a record.

    Attributes:
        name: of the view.
        R: (rows, E) score on experience j after experience i, NaN where not evaluated; rows is the last row's index + 1,
            E the number of experiences tested. A joint run has values in its last row only.
        b: (E,) score of the freshly initialised model.
        n: (E,) test samples, or bytes for language modelling.
        within: (experience being trained, step, (E,) scores) of evaluations within experiences.
        higher_is_better: false for bits per byte.
    """

    name: str
    R: Array
    b: Array
    n: Array
    within: tuple[tuple[int, int, Array], ...]
    higher_is_better: bool

    @property
    def evaluated(self) -> bool:
        """Whether any cell of R has a value."""
        return bool(np.isfinite(self.R).any())

    def upto(self, index: int) -> View:
        """The view as it was after experience `index`, of the experiences 0 … index: R is (index+1, index+1)."""
        k = index + 1
        assert 1 <= k <= self.R.shape[0]
        within = tuple((i, step, scores[:k]) for i, step, scores in self.within if i < k)
        return replace(self, R=self.R[:k, :k], b=self.b[:k], n=self.n[:k], within=within)


def view(record: Record, name: str) -> View:
    """The matrix of one view; see `VIEWS` for the names that a record's kind has."""
    assert name in VIEWS[record.kind], f"{name} of a record of kind {record.kind}"
    rows = [record.rows.get(i) for i in range(record.last + 1)]
    R = np.array([_scores(record, row, name) for row in rows], dtype=np.float64).reshape(len(rows), len(record))
    b = _scores(record, record.rows.get(INITIAL), name)
    n = np.array([t.sum(dtype=np.int64) if record.kind == "language" else len(t) for t in record.targets], np.float64)
    within = tuple((row.index, row.step or 0, _scores(record, row, name)) for row in record.within)
    return View(name, R, b, n, within, higher_is_better=name != "bits_per_byte")


def views(record: Record) -> dict[str, View]:
    """All views of a record by name."""
    return {name: view(record, name) for name in VIEWS[record.kind]}


def _scores(record: Record, row: Row | None, name: str) -> Array:
    columns = row.columns if row else {}
    return np.array(
        [_score(columns[j], record.targets[j], name) if j in columns else math.nan for j in range(len(record))],
        dtype=np.float64,
    )


def _score(column: Column, targets: np.ndarray, name: str) -> float:
    if name in ("class_il", "task_il"):
        predicted = column.pred if name == "class_il" else column.task_pred
        # no prediction at all means that the view does not exist here; single ones (-1) are simply wrong
        if predicted is None or predicted.size == 0 or (predicted < 0).all():
            return math.nan
        return float(np.mean(predicted == targets))
    if column.tokens is None or column.tokens.sum() == 0:
        return math.nan
    tokens = float(column.tokens.sum(dtype=np.int64))
    if name == "bits_per_byte":
        return math.nan if column.nll is None else float(column.nll.sum(dtype=np.float64)) / tokens / math.log(2)
    return math.nan if column.correct is None else float(column.correct.sum(dtype=np.int64)) / tokens
