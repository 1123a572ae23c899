"""Backward and forward transfer (Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory"). Notation: `cmoe.metrics.accuracy`."""

from __future__ import annotations

import numpy as np

from cmoe.metrics.value import Array, Undefined, evaluated, square


def bwt_gem(R: Array) -> float:
    """Mean over j < T-1 of R[T-1, j] - R[j, j]; negative is forgetting."""
    T = square(R)
    old = list(range(T - 1))
    return float((evaluated(R, [T - 1] * len(old), old) - evaluated(R, old, old)).mean())


def fwt_gem(R: Array, b: Array) -> float:
    """Mean over j >= 1 of R[j-1, j] - b[j], where b is the freshly initialised model.

    Not defined in class-incremental learning where unseen classes are masked or the head grows: the caller knows.
    """
    T = square(R)
    later = list(range(1, T))
    before = evaluated(R, [j - 1 for j in later], later)
    if np.isnan(b[1:T]).any():
        raise Undefined("the freshly initialised model was not evaluated")
    return float((before - b[1:T]).mean())
