"""Calibration of the predicted class, from what the record holds: the confidence and whether it was right.

The record has no full distributions, so negative log-likelihood and the multi-class Brier score cannot be computed from
it; `evaluation.diagnostics: all` measures them while the model is there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmoe.metrics.value import Undefined


def ece(confidence: NDArray[np.float32], correct: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error of the top label (Guo et al. 2017), by torchmetrics.

    Args:
        confidence: (n,) probability of the predicted class.
        correct: (n,) whether the prediction was right.
        bins: equally wide bins of the confidence.
    """
    if confidence.size == 0:
        raise Undefined("there are no predictions")
    if np.isnan(confidence).any():
        raise Undefined("confidences were not recorded")
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    # float64: bins are summed, and the figure must not depend on the order of the samples
    scores = torch.from_numpy(confidence.astype(np.float64)).clamp(0.0, 1.0)
    return float(binary_calibration_error(scores, torch.from_numpy(correct.astype(np.int64)), n_bins=bins, norm="l1"))


def brier_top_label(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    """Mean of (confidence - correct)², the Brier score of "the top label is right"; arguments as for `ece`."""
    if confidence.size == 0:
        raise Undefined("there are no predictions")
    if np.isnan(confidence).any():
        raise Undefined("confidences were not recorded")
    return float(np.mean((confidence.astype(np.float64) - correct) ** 2))


def reliability(
    confidence: NDArray[np.float32], correct: NDArray[np.bool_], bins: int = 15
) -> list[tuple[int, float, float]]:
    """What a reliability diagram shows: of each bin of the confidence, how many predictions, their mean confidence and
    their accuracy (both nan in an empty bin); arguments and bins as for `ece`, the mean of their distances.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    scores = np.clip(confidence.astype(np.float64), 0.0, 1.0)
    which = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, bins - 1)
    table = []
    for b in range(bins):
        own = which == b
        n = int(own.sum())
        table.append((n, float(scores[own].mean()), float(correct[own].mean())) if n else (0, np.nan, np.nan))
    return table
