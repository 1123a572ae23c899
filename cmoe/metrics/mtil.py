"""The three figures of multi-domain task-incremental learning (ZSCL, Zheng et al. 2023; MoE-Adapters, Yu et al. 2024).

Notation: `cmoe.metrics.accuracy`.
"""

from __future__ import annotations

import numpy as np

from cmoe.metrics.value import Array, evaluated, square


def transfer(R: Array) -> float:
    """For each j >= 1 the mean over i < j of R[i, j]; then the mean over j."""
    T = square(R)
    columns = [evaluated(R, list(range(j)), [j] * j).mean() for j in range(1, T)] or [evaluated(R, [], [])]
    return float(np.mean(columns))


def average(R: Array) -> float:
    """Mean of the whole matrix."""
    T = square(R)
    return float(evaluated(R, [i for i in range(T) for _ in range(T)], [j for _ in range(T) for j in range(T)]).mean())


def last(R: Array) -> float:
    """Mean of the last row."""
    T = square(R)
    return float(evaluated(R, [T - 1] * T, list(range(T))).mean())
