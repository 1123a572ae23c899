"""Metrics of a row's document under their names."""

from __future__ import annotations

from collections.abc import Sequence

from cmoe.metrics.value import Value
from cmoe.tracking.diagnostics.document import Document

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
