"""Everything of some documents as one long table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cmoe.tracking.diagnostics.document import Document
from cmoe.tracking.diagnostics.metrics import EXPERTS, ROUTER, WHAT, of

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
