"""Summaries over seeds: mean, standard deviation, and 95 % intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A mean over seeds.

    Attributes:
        n: number of values.
        mean: their mean.
        std: standard deviation with n - 1 in the denominator; None for a single value.
        low, high: ends of the 95 % interval of the mean; None for a single value.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None for a single value."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """Mean, standard deviation and t interval of independent values (one per seed).

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t_quantile(n - 1, level) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def paired_difference(ours: dict[int, float], baseline: dict[int, float], level: float = 0.95) -> Summary:
    """Summary of `ours - baseline` over the seeds that both have (a paired t interval).

    Args:
        ours, baseline: value by seed.

    Raises:
        ValueError: no common seed.
    """
    seeds = sorted(ours.keys() & baseline.keys())
    if not seeds:
        raise ValueError("no seed in common")
    return summarise([ours[s] - baseline[s] for s in seeds], level)


def _t_quantile(freedom: int, level: float) -> float:
    from scipy.special import stdtrit  # scipy.stats costs a second of import time

    return float(stdtrit(freedom, 0.5 + level / 2))
