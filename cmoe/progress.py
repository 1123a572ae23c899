"""What a run tracks: the bridge from a session to the write-ahead log and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cmoe.config.plan import Plan
from cmoe.learners import Model
from cmoe.metrics import Record
from cmoe.metrics.catalogue import compute
from cmoe.metrics.record import INITIAL
from cmoe.moe.diagnostics import mutual_information, normalised_mutual_information, purity
from cmoe.rundir import RunFolder
from cmoe.streams import Stream
from cmoe.timeline import Timeline
from cmoe.tracking import diagnostics, layout
from cmoe.tracking.figures import ExpertLife, RouterLoad
from cmoe.tracking.store import locate
from cmoe.tracking.tracker import Tracker
from cmoe.tracking.wal import read

Loads = Mapping[int, Mapping[int, Mapping[str, Mapping[int, int]]]]  # row, experience, layer, expert -> tokens


class Progress:
    """One run's log.

    Args:
        folder: the run's.
        plan: the run's.
        stream: the run's.
        environment: what `cmoe.environment.environment` found.
        note: told once when the tracking server cannot be reached.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, stream: Stream, environment: dict[str, Any], note: Any = None
    ) -> None:
        self.folder, self.plan, self.stream, self.environment = folder, plan, stream, environment
        self.last_loss: float | None = None
        tracking = plan.tracking
        recorded = folder.facts().get("server")
        location = locate(tracking["root"], tracking["uri"], recorded) if tracking["enabled"] else None
        self.tracker = Tracker(
            folder.path, folder.id, plan.experiment, location, **({"on_problem": note} if note else {})
        )

    def start(self) -> None:
        """Log what is known before training."""
        if self.folder.wal.exists():  # killed before the first checkpoint
            self.tracker.resume(0)
        layout.log_start(
            self.tracker,
            self.plan.to_dict(),
            self.plan.strategies,
            self.plan.label,
            data=(self.stream.name, self.stream.fingerprint),
            commit=self.environment["git"],
        )

    def resume(self, length: int) -> None:
        """Go back to the log as a checkpoint knew it; an extended run's new settings are logged."""
        self.tracker.resume(length)
        logged = {e["key"]: e["value"] for e, _ in read(self.folder.wal, 0, length) if e["kind"] == "param"}
        now = layout.parameters(self.plan.to_dict(), self.plan.strategies, self.plan.label)
        changed = {k: v for k, v in now.items() if logged.get(k) != v}
        if changed:
            layout.log_change(self.tracker, changed)

    def baseline(self, record: Record) -> None:
        """The row of the initial model."""
        layout.log_row(self.tracker, record, INITIAL)

    def structure(self, model: Model, row: int) -> None:
        """The model's size for the segment that begins."""
        total, active = model.parameter_counts()
        layout.log_model(self.tracker, total, active, row)

    def losses(self, values: dict[str, float], step: int) -> None:
        """A point of the training curves."""
        self.last_loss = values["train/loss"]
        self.tracker.metrics(values, step)

    def diagnosed(self, document: diagnostics.Document) -> dict[str, float]:
        """Keep what a row says about the experts, beside the row; returns its metrics."""
        diagnostics.save(self.folder.rows, document)
        return diagnostics.metrics(document)

    def row(self, row: int, record: Record, facts: Mapping[str, float], unseen_masked: bool) -> dict[str, float]:
        """A row of the matrix, every metric as of it, and the strategies' figures; returns the metrics there are."""
        self.tracker.metrics(facts, row)
        if row not in record.rows:  # evaluated only every n-th experience
            return {}
        values = layout.log_row(self.tracker, record, row, unseen_masked=unseen_masked)
        return {name: v.value for name, v in values.items() if v.value is not None}

    def finish(
        self,
        record: Record,
        model: Model,
        timeline: Timeline,
        loads: Loads,
        seconds: float,
        unseen_masked: bool,
        held: int = 0,
    ) -> dict[str, Any]:
        """Figures and tables of the whole run; returns the facts for `run.json`.

        `held` counts parameters of further networks that a strategy keeps for prediction.
        """
        values = compute(record, unseen_masked=unseen_masked)
        pictures = layout.log_matrices(self.tracker, record, self.folder.id)
        layout.log_metrics_table(self.tracker, values)
        names = [e.name for e in self.stream.experiences]
        last = loads[max(loads)] if loads else {}
        shares = _shares(last, len(names))
        if shares or timeline.events:
            lives = _lives(timeline, model, shares)
            pictures += layout.log_experts(self.tracker, lives, shares, names, self.folder.id)
        documents = diagnostics.load(self.folder.rows, [row for row in record.rows if row != INITIAL])
        if documents:
            pictures += layout.log_diagnostics(self.tracker, documents, self.folder.id)
            values |= diagnostics.values(documents[-1]) if documents[-1]["row"] == record.last else {}
        total, active = model.parameter_counts()
        self.tracker.metrics({"time/wall_seconds": seconds}, record.last)
        return {
            "metrics": {name: v.value for name, v in values.items()},
            "reasons": {name: v.reason for name, v in values.items() if v.reason},
            "parameters_total": total + held,
            "parameters_active": active,
            "wall_seconds": round(seconds, 3),
            "pictures": [str(p.relative_to(self.folder.path)) for p in pictures],
        }

    def sync(self) -> int:
        """Make the log durable; returns its length."""
        return self.tracker.sync()

    def commit(self, length: int) -> None:
        """A durable checkpoint holds `length`: what came before may be delivered."""
        self.tracker.commit(length)

    def end(self, status: str) -> None:
        """The log's last line: 'FINISHED', 'FAILED' or 'KILLED'."""
        self.tracker.end(status)

    def close(self) -> bool:
        """Deliver what is committed; returns whether everything got there."""
        return self.tracker.close()


def _shares(load: Mapping[int, Mapping[str, Mapping[int, int]]], experiences: int) -> list[RouterLoad]:
    """Per layer, the share of each experience's tokens that went to each expert."""
    layers = list(dict.fromkeys(layer for by_layer in load.values() for layer in by_layer))
    shares = []
    for layer in layers:
        experts = tuple(sorted({e for by_layer in load.values() for e in by_layer.get(layer, {})}))
        share = np.full((experiences, len(experts)), np.nan)
        table = torch.tensor([[by_layer.get(layer, {}).get(e, 0) for e in experts] for by_layer in load.values()])
        for j, by_layer in load.items():
            counts = by_layer.get(layer, {})
            total = sum(counts.values())
            if total:
                share[j] = [counts.get(e, 0) / total for e in experts]
        nats, part = mutual_information(table), normalised_mutual_information(table)
        known = None if math.isnan(nats) else (nats, None if math.isnan(part) else part)
        shares.append(RouterLoad(layer, experts, share, known, None if known is None else purity(table)))
    return shares


def _lives(timeline: Timeline, model: Model, shares: list[RouterLoad]) -> list[ExpertLife]:
    """The life of each expert that ever was."""
    layers = model.moe_layers()
    used = {
        (load.layer, expert): {j: float(s) for j, s in enumerate(load.share[:, k]) if np.isfinite(s) and s > 0}
        for load in shares
        for k, expert in enumerate(load.experts)
    }
    tasks: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, layer in layers.items():
        for task, experts in layer.tasks.items():
            for expert in experts:
                tasks[name, expert] = (*tasks.get((name, expert), ()), task)
    return timeline.lives({name: layer.ids for name, layer in layers.items()}, used, tasks)
