"""Forgetting and intransigence. Notation: `cmoe.metrics.accuracy`."""

from __future__ import annotations

import numpy as np

from cmoe.metrics.gem import bwt_gem
from cmoe.metrics.value import Array, Undefined, evaluated, square


def forgetting_chaudhry(R: Array) -> float:
    """Mean over j < T-1 of max over l in [0, T-2] of R[l, j], minus R[T-1, j] (Chaudhry et al. 2018); may be negative."""
    T = square(R)
    old = list(range(T - 1))
    last = evaluated(R, [T - 1] * len(old), old)
    history = evaluated(R, [i for i in old for _ in old], [j for _ in old for j in old])
    return float((history.reshape(T - 1, T - 1).max(axis=0) - last).mean())


def forgetting_first_minus_last(R: Array) -> float:
    """-bwt_gem: what Avalanche calls forgetting, averaged over the experiences before the last."""
    return -bwt_gem(R)


def intransigence(R: Array, joint: Array | None) -> float:
    """Mean over i of joint[i] - R[i, i] (Chaudhry et al. 2018).

    Args:
        joint: (T,) score on experience i of a model trained jointly on experiences 0 … i; None where there is no such run.
    """
    T = square(R)
    if joint is None:
        raise Undefined("needs reference runs trained jointly on the experiences so far")
    if len(joint) < T or np.isnan(joint[:T]).any():
        raise Undefined("the joint reference does not cover every experience")
    return float((joint[:T] - evaluated(R, list(range(T)), list(range(T)))).mean())
