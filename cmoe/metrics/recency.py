"""How much class-incremental predictions lean to the newest classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cmoe.metrics.value import Undefined


def recency_bias(predictions: Sequence[NDArray | None], classes: Sequence[Sequence[int]]) -> float:
    """Share of old experiences' test samples that are predicted as a class of the newest experience.

    Args:
        predictions: of the last row, (n_j,) predicted classes for each experience j; None where not evaluated.
        classes: the classes of each experience.

    Raises:
        Undefined: fewer than two experiences, an old one not evaluated, or the newest brings no classes of its own.
    """
    assert len(predictions) == len(classes)
    if len(classes) < 2:
        raise Undefined("needs at least two experiences")
    newest = set(classes[-1])
    if newest & {c for old in classes[:-1] for c in old}:
        raise Undefined("the newest experience shares classes with earlier ones")
    parts = []
    for j, predicted in enumerate(predictions[:-1]):
        if predicted is None:
            raise Undefined(f"not evaluated: predictions for experience {j} in the last row")
        parts.append(predicted)
    return float(np.isin(np.concatenate(parts), sorted(newest)).mean())
