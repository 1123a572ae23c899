"""A metric's value, or the reason why a run has none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Undefined(ValueError):
    """The metric has no value for this run; the text says why."""


@dataclass(frozen=True)
class Value:
    """Exactly one of the two is set: the value, or the reason why there is none."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.reason is None)


def evaluated(R: Array, rows: list[int], columns: list[int]) -> Array:
    """The cells `R[rows[k], columns[k]]`, all of which must have been evaluated.

    Args:
        R: (T, T) matrix, NaN where not evaluated.
        rows, columns: equally long lists of indices; at least one.

    Raises:
        Undefined: there is no such cell, or one was not evaluated (the first few are named).
    """
    if not rows:
        raise Undefined("needs at least two experiences")
    cells = R[np.array(rows, dtype=np.intp), np.array(columns, dtype=np.intp)]
    missing = np.flatnonzero(np.isnan(cells))
    if missing.size:
        named = ", ".join(f"R[{rows[k]},{columns[k]}]" for k in missing[:3])
        more = f" and {missing.size - 3} more" if missing.size > 3 else ""
        raise Undefined(f"not evaluated: {named}{more}")
    return cells


def square(R: Array) -> int:
    """T of a (T, T) matrix."""
    assert R.ndim == 2, f"expected a matrix, got {R.shape}"
    assert R.shape[0] == R.shape[1] >= 1, f"expected a (T, T) matrix, got {R.shape}"
    return R.shape[0]


def pairs(T: int, below: bool) -> tuple[list[int], list[int]]:
    """Indices (i, j) of the cells below the diagonal (j < i), or above it (j > i)."""
    cells = [(i, j) for i in range(T) for j in range(T) if (j < i if below else j > i)]
    return [i for i, _ in cells], [j for _, j in cells]
