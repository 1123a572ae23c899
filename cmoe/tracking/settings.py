"""Whether runs may be averaged: which settings they share and in which they differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cmoe.tracking.layout import flatten
from cmoe.tracking.summary import RunSummary

# settings that change no result, or that runs are averaged over
APART = (
    "seed", "label", "experiment", "plugins", "tracking.", "checkpoint.", "trainer.log_every", "trainer.chunk",
    "evaluation.diagnostics",
)  # fmt: skip
SHARED = ("stream.", "evaluation.")  # what a fair comparison has in common
SHOWN = 3  # differing settings in a label


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The dotted settings of a configuration that decide its result, but for the seed."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(APART)}


def same(a: RunSummary, b: RunSummary) -> bool:
    """Whether two runs have the same settings."""
    return settings(a.config) == settings(b.config)


def tell_apart(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """The runs, with a label of its own for each of several settings under one label: `replay (trainer.epochs=12)`.

    They would be averaged otherwise, as if only the seed differed.
    """
    by_label: dict[str, dict[str, dict[str, str]]] = {}
    for run in runs:
        own = settings(run.config)
        by_label.setdefault(run.label, {})[_key(own)] = own
    renamed = []
    for run in runs:
        variants = list(by_label[run.label].values())
        if len(variants) == 1:
            renamed.append(run)
            continue
        keys = telling(variants)
        own = settings(run.config)
        said = [f"{k}={own.get(k, 'unset')}" for k in keys[:SHOWN]] + ["…"] * (len(keys) > SHOWN)
        renamed.append(replace(run, label=f"{run.label} ({', '.join(said)})"))
    if len({(r.label, _key(settings(r.config))) for r in renamed}) > len({r.label for r in renamed}):
        # beyond what is shown: a number tells them apart
        numbers: dict[str, list[str]] = {}
        for i, run in enumerate(renamed):
            known = numbers.setdefault(run.label, [])
            key = _key(settings(run.config))
            known += [key] * (key not in known)
            if known.index(key):
                renamed[i] = replace(run, label=f"{run.label} #{known.index(key) + 1}")
    return renamed


def telling(variants: Sequence[Mapping[str, str]]) -> list[str]:
    """As few keys as it takes to tell several settings apart, those first that tell most."""
    left, chosen = differing(variants), []

    def alike(keys: Sequence[str]) -> int:
        """Pairs of settings, and each with itself, that these keys do not tell apart."""
        return sum(n * n for n in Counter(tuple(v.get(k) for k in keys) for v in variants).values())

    while alike(chosen) > len(variants):
        chosen.append(min(left, key=lambda k: alike([*chosen, k])))  # the first among equals
        left.remove(chosen[-1])
    return chosen


def differing(variants: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that are not the same in all of several settings, in order of the first that has them."""
    names = list(dict.fromkeys(k for variant in variants for k in variant))
    return [k for k in names if len({variant.get(k) for variant in variants}) > 1]


def warnings(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader of the comparison must know: a stream or evaluation that is not the same for all."""
    keys = [k for k in differing([settings(run.config) for run in runs]) if k.startswith(SHARED)]
    return [f"the runs are not of one stream and evaluation, they differ in: {', '.join(keys)}"] if keys else []


def _key(own: Mapping[str, str]) -> str:
    return json.dumps(own, sort_keys=True)
