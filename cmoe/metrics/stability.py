"""The stability gap (De Lange et al. 2023, "Continual evaluation for lifelong learning"). Notation: `cmoe.metrics.accuracy`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cmoe.metrics.value import Array, Undefined, evaluated, square

Within = Sequence[tuple[int, Array]]  # (the experience being trained, (T,) scores at that moment)


def min_acc(R: Array, within: Within) -> float:
    """Mean over j < T-1 of the worst R[·, j] at any evaluation during the training of a later experience.

    Args:
        within: the evaluations made while an experience was being trained (every n steps); the matrix's own rows count too.

    Raises:
        Undefined: an experience after the first was trained without evaluations within it.
    """
    T = square(R)
    if T < 2:
        raise Undefined("needs at least two experiences")
    without = sorted(set(range(1, T)) - {i for i, _ in within})
    if without:
        raise Undefined(f"needs evaluations every n steps; there is none while experience {without[0]} is trained")
    worst = []
    for j in range(T - 1):
        rows = list(range(j + 1, T))
        inside = np.array([scores[j] for i, scores in within if j < i < T])
        if np.isnan(inside).any():
            raise Undefined(f"an evaluation within a later experience left out experience {j}")
        worst.append(min(evaluated(R, rows, [j] * len(rows)).min(), inside.min()))
    return float(np.mean(worst))


def wc_acc(R: Array, within: Within) -> float:
    """Worst-case accuracy: R[T-1, T-1] / T + (1 - 1/T) · min_acc."""
    T = square(R)
    newest = float(evaluated(R, [T - 1], [T - 1])[0])
    return newest / T + (1.0 - 1.0 / T) * min_acc(R, within)
