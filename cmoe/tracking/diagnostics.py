"""What is tracked of a run's experts: metrics and a table, from one document a row.

A document is what `cmoe.diagnosis.diagnose` returns, as plain containers. It lies beside its row, so that figures can be
drawn anew and metrics added later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmoe.metrics.value import Value
from cmoe.tracking.figures import Calibrated, Calibration, DropOne, Similarity
from cmoe.tracking.files import read_json, write_atomic

Document = dict[str, Any]

# metric -> what it is called in a layer's document, and why it may be absent
ROUTER = {
    "router/load_cv": ("load_cv", "no tokens"),
    "router/load_max_over_mean": ("load_max_over_mean", "no tokens"),
    "router/load_entropy": ("load_entropy", "no tokens"),
    "router/dead_experts": ("dead", "no tokens"),
    "router/entropy": ("entropy", "no router has scores"),
    "router/dropped_share": ("dropped_share", "no router has a capacity"),
    "router/unserved_share": ("unserved_share", "no tokens"),
    "router/task_information": ("task_information", "no tokens"),
    "router/task_information_normalised": (
        "task_information_normalised", "needs two experiences and two experts that are used"),
    "router/task_purity": ("task_purity", "no tokens"),
    "experts/flops_per_token": ("flops_per_token", "no tokens"),
}  # fmt: skip
EXPERTS = {
    "experts/cosine": ("cosine", "needs two experts whose output is not 0"),
    "experts/cka": ("cka", "needs two experts whose output is not constant"),
    "experts/disagreement": ("disagreement", "needs two experts"),
    "experts/drop_one_accuracy": ("drop_one_accuracy", "no samples"),
    "experts/drop_one_worst": ("drop_one_worst", "no samples"),
}
POOLS = ("gate", "uniform", "log")
WHO = ("model", "alone", *(f"{pool}_pool" for pool in POOLS))
WHAT = ("accuracy", "ece", "nll", "brier")
SUMMED = ("dead", "flops_per_token")


def save(folder: Path, document: Document) -> None:
    """Write a row's document durably."""
    write_atomic(_path(folder, document["row"]), (json.dumps(document, allow_nan=False) + "\n").encode())


def load(folder: Path, rows: Sequence[int]) -> list[Document]:
    """The documents of these rows, those that are there."""
    found = [read_json(_path(folder, row), None) for row in sorted(rows)]
    return [document for document in found if isinstance(document, dict)]


def _path(folder: Path, row: int) -> Path:
    return Path(folder) / f"diagnostics_{row:04d}.json"


def values(document: Document) -> dict[str, Value]:
    """Every metric of a row: the mean over layers (counts and costs: the sum), or why there is none."""
    layers = list(document["layers"].values())
    known = ROUTER | (EXPERTS if document["level"] == "all" else {})
    found = {name: _joined([of(layer, key) for layer in layers], key in SUMMED, _reason(document, name, absent))
             for name, (key, absent) in known.items()}  # fmt: skip
    if document["level"] == "all":
        for who in WHO:
            for what in WHAT:
                name = f"calibration/{who}_{what}"
                told = [(document.get("model") or {}).get(what)] if who == "model" else [
                    _told(layer, who, what) for layer in layers
                ]  # fmt: skip
                found[name] = _joined(told, False, _reason(document, who, "no samples"))
    return found


def metrics(document: Document) -> dict[str, float]:
    """The metrics that a row has, and where there are several layers each one's as `<section>/<layer>/<name>`."""
    found = {name: v.value for name, v in values(document).items()}
    if len(document["layers"]) > 1:
        for layer, entry in document["layers"].items():
            alone = values({**document, "layers": {layer: entry}})
            for name, v in alone.items():
                section, _, rest = name.partition("/")
                if not rest.startswith("model_"):
                    found[f"{section}/{layer}/{rest}"] = v.value
    return {name: value for name, value in found.items() if value is not None}


def of(layer: Document, key: str) -> float | None:
    """One number of a layer; None where it has none."""
    if key == "dead":
        return None if "dead" not in layer else float(len(layer["dead"]))
    if key.startswith("drop_one"):
        accuracies = [a["accuracy"] for a in layer.get("without", []) if a]
        if not accuracies:
            return None
        return min(accuracies) if key == "drop_one_worst" else sum(accuracies) / len(accuracies)
    return layer.get(key)


def _told(layer: Document, who: str, what: str) -> float | None:
    """A figure of a layer's experts alone (the mean over them), or of their answers joined."""
    if who == "alone":
        figures = [a.get(what) for a in layer.get("alone", []) if a.get(what) is not None]
        return sum(figures) / len(figures) if figures else None
    return layer.get("pools", {}).get(who.removesuffix("_pool"), {}).get(what)


def _joined(numbers: Sequence[float | None], summed: bool, reason: str) -> Value:
    known = [n for n in numbers if n is not None]
    if not known:
        return Value(None, reason)
    return Value(sum(known) if summed else sum(known) / len(known))


def _reason(document: Document, name: str, default: str) -> str:
    """Why no layer has a figure: what was noted when it was measured, else what it needs."""
    places = [document["reasons"], *(layer["reasons"] for layer in document["layers"].values())]
    keys = ["router"] if name.startswith("router/") else ["router", "experts", name]
    if "drop_one" in name:
        keys.append("drop_one")
    return next((place[key] for place in places for key in keys if key in place), default)


COLUMNS = ("after", "layer", "expert", "other", "experience", "name", "value")


def table(documents: Sequence[Document]) -> list[tuple[Any, ...]]:
    """Everything as one long table with `COLUMNS`: of which layer, expert (and other expert), tested on which
    experience; empty is all of them.
    """
    return [
        (document["row"], layer, *line)
        for document in documents
        for layer, lines in [("", _of_model(document)), *((n, _of_layer(x, document)) for n, x in document["layers"].items())]
        for line in lines
        if line[-1] is not None
    ]  # fmt: skip


Line = tuple[Any, Any, Any, str, float | None]  # expert, other, experience, name, value


def _of_model(document: Document) -> Iterator[Line]:
    for j, drift in zip(document["experiences"], document["drift"], strict=True):
        yield "", "", j, "drift", drift
    yield from _of_answers("", "model", document.get("model") or {}, document)


def _of_layer(layer: Document, document: Document) -> Iterator[Line]:
    for name in dict.fromkeys(key for key, _ in (ROUTER | EXPERTS).values()):
        yield "", "", "", "dead_experts" if name == "dead" else name, of(layer, name)
    experts, experiences = layer["experts"], document["experiences"]
    for j, counts in zip(experiences, layer.get("load", []), strict=False):
        for e, n in zip(experts, counts, strict=True):
            yield e, "", j, "load", n
    for e, share in zip(experts, layer.get("purity_of_experts", []), strict=False):
        yield e, "", "", "purity", share
    for name, matrix in layer.get("pairs", {}).items():
        for a, row in zip(experts, matrix, strict=True):
            for b, value in zip(experts, row, strict=True):
                if a < b:
                    yield a, b, "", name, value
    for name in ("alone", "without"):
        for e, answers in zip(experts, layer.get(name, []), strict=False):
            yield from _of_answers(e, name, answers, document)
    for name, answers in layer.get("pools", {}).items():
        yield from _of_answers("", f"{name}_pool", answers, document)


def _of_answers(expert: Any, who: str, answers: Document, document: Document) -> Iterator[Line]:
    for what in WHAT:
        yield expert, "", "", f"{who}_{what}", answers.get(what)
    for j, accuracy in zip(document["experiences"], answers.get("accuracies", []), strict=False):
        yield expert, "", j, f"{who}_accuracy", accuracy


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
