"""What the pictures of a document show."""

from __future__ import annotations

import numpy as np

from cmoe.tracking.diagnostics.document import Document
from cmoe.tracking.diagnostics.metrics import POOLS
from cmoe.tracking.figures import Calibrated, Calibration, DropOne, Similarity

DRAWN = 6  # layers in one picture; of more, evenly apart


def _drawn(document: Document, key: str) -> list[tuple[str, Document]]:
    """Layers that have what a picture shows."""
    having = [(name, layer) for name, layer in document["layers"].items() if layer.get(key)]
    n = min(len(having), DRAWN)
    return [having[i * (len(having) - 1) // max(n - 1, 1)] for i in range(n)]


def similarities(document: Document) -> list[Similarity]:
    """For the picture of how alike experts are; layers with one expert have nothing to show."""
    return [
        Similarity(name, tuple(layer["experts"]), {k: np.array(m, dtype=np.float64) for k, m in layer["pairs"].items()})
        for name, layer in _drawn(document, "pairs")
        if len(layer["experts"]) > 1
    ]


def dropped(document: Document) -> list[DropOne]:
    """For the picture of what is lost without each expert."""
    own = document.get("model") or {}
    found = []
    for name, layer in _drawn(document, "without"):
        if all(layer["without"]):
            each = np.array([a["accuracies"] for a in layer["without"]], dtype=np.float64)
            before = np.array(own["accuracies"], dtype=np.float64)
            lost = np.array([own["accuracy"] - a["accuracy"] for a in layer["without"]])
            found.append(DropOne(name, tuple(layer["experts"]), lost, before - each))
    return found


def calibrations(document: Document) -> list[Calibration]:
    """For the picture of how well the model and each expert alone are calibrated."""
    own = document.get("model")
    if not own:
        return []
    return [
        Calibration(
            name,
            _calibrated("the model", own),
            [_calibrated(f"expert {e} alone", a) for e, a in zip(layer["experts"], layer["alone"], strict=True) if a],
            [_calibrated(f"{pool} pool", layer["pools"][pool]) for pool in POOLS if layer["pools"].get(pool)],
        )
        for name, layer in _drawn(document, "alone")
    ]


def _calibrated(name: str, answers: Document) -> Calibrated:
    bins = [(n, c, a) for n, c, a in answers["reliability"]]
    return Calibrated(name, answers["accuracy"], answers["ece"], answers["nll"], bins)
