"""The metrics of Díaz-Rodríguez et al. 2018, "Don't forget, there is more than forgetting". Notation: `cmoe.metrics.accuracy`."""

from __future__ import annotations

from cmoe.metrics.value import Array, evaluated, pairs, square


def acc_diaz(R: Array) -> float:
    """Mean of R over j <= i."""
    T = square(R)
    rows, columns = pairs(T, below=True)
    return float(evaluated(R, [*rows, *range(T)], [*columns, *range(T)]).mean())


def bwt_diaz(R: Array) -> float:
    """Mean over j < i of R[i, j] - R[j, j]."""
    rows, columns = pairs(square(R), below=True)
    return float((evaluated(R, rows, columns) - evaluated(R, columns, columns)).mean())


def rem(R: Array) -> float:
    """Remembering: 1 - |min(bwt_diaz, 0)|."""
    return 1.0 - abs(min(bwt_diaz(R), 0.0))


def bwt_plus(R: Array) -> float:
    """Positive backward transfer: max(bwt_diaz, 0)."""
    return max(bwt_diaz(R), 0.0)


def fwt_diaz(R: Array) -> float:
    """Mean of R over j > i."""
    return float(evaluated(R, *pairs(square(R), below=False)).mean())
