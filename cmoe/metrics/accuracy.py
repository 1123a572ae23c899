"""Means of the matrix: how good the model is at the end and along the way.

In all functions `R[i, j]` is the score on experience j's test set after training on experience i, NaN where it was not
evaluated, and `n[j]` the number of test samples (bytes, for language modelling) of experience j. Each raises
`Undefined` when a cell that it needs was not evaluated.
"""

from __future__ import annotations

import numpy as np

from cmoe.metrics.value import Array, evaluated, square


def acc_macro(R: Array) -> float:
    """Mean over j of R[T-1, j] (Lopez-Paz & Ranzato 2017)."""
    T = square(R)
    return float(evaluated(R, [T - 1] * T, list(range(T))).mean())


def acc_micro(R: Array, n: Array) -> float:
    """Mean over j of R[T-1, j], weighted by n[j]; Avalanche's StreamAccuracy over the T experiences."""
    T = square(R)
    return float(np.average(evaluated(R, [T - 1] * T, list(range(T))), weights=n[:T]))


def _incremental(R: Array, weights: Array) -> float:
    T = square(R)
    rows = [np.average(evaluated(R, [i] * (i + 1), list(range(i + 1))), weights=weights[: i + 1]) for i in range(T)]
    return float(np.mean(rows))


def avg_incremental_acc(R: Array, n: Array) -> float:
    """Mean over i of the accuracy over all classes seen so far, weighted by n[j], j <= i (iCaRL, Rebuffi et al. 2017)."""
    return _incremental(R, n)


def avg_incremental_acc_macro(R: Array) -> float:
    """`avg_incremental_acc` with every seen experience weighing the same."""
    return _incremental(R, np.ones(square(R)))


def learning_accuracy(R: Array) -> float:
    """Mean of R[i, i]: each experience just after it was learned (Riemer et al. 2019)."""
    T = square(R)
    return float(evaluated(R, list(range(T)), list(range(T))).mean())
