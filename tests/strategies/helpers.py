"""Runs in this process, small enough for many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmoe.api import new_run, plan_of
from cmoe.learners import Batch
from cmoe.moe import RouteContext
from cmoe.reporting import Reporter
from cmoe.runner import train
from cmoe.session import Session
from cmoe.strategies import Segment
from cmoe.streams import evaluation_batches
from cmoe.streams.data import data_folder

PLUGINS = [Path(__file__).parent / "tasks"]
DIGITS: dict[str, Any] = {
    "stream": {"name": "split_digits", "experiences": 5},
    "model": {"name": "mlp", "hidden": [16]},
    "strategy": "naive",
    "optimizer": {"name": "sgd", "lr": 0.1},
    "trainer": {"epochs": 1, "batch_size": 16, "threads": 1},
    "tracking": {"enabled": False},
}
BY_TASK = {"experts": 1, "router": "task_table"}
LEARNED = {"experts": 2, "router": {"name": "topk", "k": 1, "order": "after"}}
# one small model for every modality that can have experts
WORLDS: dict[str, dict[str, Any]] = {
    "mlp": {"stream": {"name": "split_digits", "experiences": 5}, "model": {"name": "mlp", "hidden": [16, 12]}},
    "vit": {
        "stream": {"name": "split_digits", "experiences": 5, "limit": 3},
        "model": {"name": "vit", "patch": 4, "depth": 2, "dim": 16, "heads": 2},
    },
    "text_encoder": {
        "stream": {"name": "tiny_text"},
        "model": {"name": "text_encoder", "depth": 2, "dim": 16, "heads": 2, "hidden": 24},
    },
    "byte_lm": {
        "stream": {"name": "tiny_bytes"},
        "model": {"name": "byte_lm", "depth": 2, "dim": 16, "heads": 2, "hidden": 24},
    },
}


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with changes; where both have a mapping, key by key. A changed `name` replaces the mapping."""
    out = copy.deepcopy(dict(base))
    for change in changes:
        for key, value in change.items():
            old = out.get(key)
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            if both and value.get("name", old.get("name")) == old.get("name"):
                out[key] = merged(old, value)
            else:
                out[key] = copy.deepcopy(value)
    return out


class OnRow(Reporter):
    """Calls back after each row of the matrix."""

    def __init__(self) -> None:
        self.call: Callable[[int], None] = lambda row: None

    def row(self, row: int, values: dict[str, float]) -> None:
        self.call(row)


def session(root: Path, *changes: Mapping[str, Any]) -> Session:
    """A run that has not begun: the digits' configuration with changes."""
    config = merged(DIGITS, {"tracking": {"root": str(root)}}, *changes)
    plan, catalogue = plan_of(config, plugins=PLUGINS)
    return Session(plan, new_run(plan), catalogue, data_folder("nowhere"), OnRow())


def opened(root: Path, *changes: Mapping[str, Any]) -> Session:
    """A run whose model, stream and strategies stand, and which has not trained."""
    made = session(root, *changes)
    made.open()
    return made


def run(root: Path, *changes: Mapping[str, Any], on_row: Callable[[Session, int], None] | None = None) -> Session:
    """A whole run."""
    made = session(root, *changes)
    assert isinstance(made.reporter, OnRow)
    if on_row is not None:
        made.reporter.call = lambda row: on_row(made, row)
    train(made)
    return made


def metrics(of: Session) -> dict[str, Any]:
    """The figures of a finished run."""
    return of.folder.facts()["metrics"]


def weights(of: Session) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in of.model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def logits_of(of: Session, experience: int) -> Tensor:
    """Logits of an experience's test set with its task label, in batches of 32."""
    of.model.eval()
    split = of.stream.experiences[experience].test
    with torch.no_grad():
        made = [
            of.model(b.x, RouteContext(task=experience)).logits
            for b in evaluation_batches(split, experience, of.stream.transform, 32)
        ]
    of.model.train()
    return torch.cat(made)


def drive(of: Session, batches: Mapping[int, Iterable[Batch]]) -> int:
    """The road of a run with batches from elsewhere; returns the number of steps."""
    for segment in of.segments:
        begin(of, segment)
        of.learner.begin_phase(of.optimizer_options.build(of._trainable()), None)
        for batch in batches[segment.last]:
            of.learner.step(batch)
        for strategy in of.strategies:
            strategy.after_experience(segment)
        of.model.train()
    return of.learner.steps


def begin(of: Session, segment: Segment) -> None:
    """Everything that happens before a segment's first step."""
    of.begin(segment)
    for strategy in of.strategies:
        strategy.before_experience(segment)
    for _, phase in of.remaining_phases(segment):
        for strategy in of.strategies:
            strategy.before_phase(segment, phase)
