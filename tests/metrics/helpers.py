"""Records made of random predictions."""

from __future__ import annotations

import numpy as np

from cmoe.metrics import Column, Record


def classification(seed=0, experiences=4, classes=2, sizes=(13, 7, 20, 10, 9), rows=None, initial=True, task=True):
    """A record with random predictions in every cell of the given rows."""
    rng = np.random.default_rng(seed)
    groups = [tuple(range(classes * j, classes * (j + 1))) for j in range(experiences)]
    targets = [rng.choice(groups[j], sizes[j]).astype(np.int32) for j in range(experiences)]
    record = Record("classification", [f"e{j}" for j in range(experiences)], groups, targets)
    for i in ([-1] if initial else []) + list(range(experiences) if rows is None else rows):
        record.add_row(i, {j: column(rng, record, j, task) for j in range(experiences)})
    return record


def column(rng, record, j, task=True):
    """Predictions that are right about half of the time."""
    t, everything = record.targets[j], sum(map(len, record.classes))
    guess = rng.integers(0, everything, len(t))
    within = rng.choice(record.classes[j], len(t))
    right = rng.random(len(t)) < 0.5
    pred = np.where(right, t, guess)
    confidence = rng.random(len(t))
    if not task:
        return Column(pred=pred, confidence=confidence)
    return Column(pred=pred, confidence=confidence, task_pred=within, task_confidence=confidence)


def language(seed=0, experiences=3):
    """A record of bits per byte."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(5, 30, 6 + j).astype(np.int32) for j in range(experiences)]
    record = Record("language", [f"d{j}" for j in range(experiences)], [()] * experiences, tokens)
    for i in range(-1, experiences):
        record.add_row(
            i,
            {
                j: Column(nll=tokens[j] * rng.random(len(tokens[j])) * 3, correct=tokens[j] // 2, tokens=tokens[j])
                for j in range(experiences)
            },
        )
    return record
