"""What is logged where: the one place that knows names, steps and files in MLflow.

Metrics (step = experience index unless said otherwise; '/' makes the sections of MLflow's charts):
    <view>/<metric>             every metric as of that row, over the experiences so far
    <view>/cells/exp_JJ         the matrix, a curve per tested experience
    <view>/baseline/exp_JJ      the untrained model (step 0)
    router/<name>, experts/<name>, calibration/<name>   of the experts, see `cmoe.tracking.diagnostics`
    train/<name>                training curves (step = global step)
    model/parameters_total, model/parameters_active, time/<name>
Parameters: the resolved configuration with dotted keys, and `strategy`, the strategies joined by '+'.
Tags: cmoe.run, cmoe.label, version.<package>, git commit. Artifacts: config.yaml, matrix/, figures/, experts/.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmoe.metrics.catalogue import compute
from cmoe.metrics.matrix import View, views
from cmoe.metrics.record import INITIAL, Record
from cmoe.metrics.value import Value
from cmoe.tracking import diagnostics, figures
from cmoe.tracking.figures import ExpertLife, RouterLoad
from cmoe.tracking.tracker import Tracker

LIFE = ["layer", "expert", "origin", "added", "frozen", "thawed", "ended", "how", "into", "tasks"]  # columns
PACKAGES = ("cmoe", "torch", "pytorch-lightning", "avalanche-lib", "timm", "torchmetrics", "numpy", "mlflow")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys; lists of plain values stay one value (JSON)."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.") if value else {name: "{}"}
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            flat |= flatten({str(k): v for k, v in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the repository around `folder` (default: this package), '+' appended when files are changed."""
    where = folder or Path(__file__).parent
    git = ["git", "-C", str(where)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def parameters(config: Mapping[str, Any], strategy: str, label: str) -> dict[str, str]:
    """What MLflow filters and groups runs by; `strategy` and `label` stand for what they came to."""
    return {**flatten(config), "strategy": strategy, "label": label}


def log_start(
    tracker: Tracker,
    config: Mapping[str, Any],
    strategy: str,
    label: str,
    *,
    data: tuple[str, str] | None = None,
    commit: str | None = None,
) -> None:
    """Parameters, tags and the configuration file of a new run.

    Args:
        config: the resolved configuration as plain containers; `config.yaml` in the run's folder is logged if there.
        strategy: names of the strategies joined by '+'; MLflow's charts group by it.
        label: name of this variant in tables.
        data: (name, fingerprint) of the stream's data.
        commit: see `git_commit`.
    """
    tracker.params(parameters(config, strategy, label))
    tracker.tag("cmoe.label", label)
    for name, version in versions().items():
        tracker.tag(f"version.{name}", version)
    if commit:
        tracker.tag("mlflow.source.git.commit", commit.rstrip("+"))
        tracker.tag("git.commit", commit)
    if data:
        tracker.dataset(*data)
    if (tracker.run_dir / "config.yaml").exists():
        tracker.artifact(tracker.run_dir / "config.yaml")


def log_change(tracker: Tracker, changed: Mapping[str, str]) -> None:
    """Settings of a run that was extended: MLflow's parameters never change, so they arrive as tags `changed.<key>`."""
    tracker.params(changed)
    tracker.artifact(tracker.run_dir / "config.yaml")


def log_row(tracker: Tracker, record: Record, index: int, *, unseen_masked: bool = False) -> dict[str, Value]:
    """One row of the matrix with all metrics as of it; returns them. Row -1 logs the baseline at step 0."""
    for name, view in views(record).items():
        if index == INITIAL:
            tracker.metrics(_cells(f"{name}/baseline", view.b), step=0)
        elif view.evaluated:
            tracker.metrics(_cells(f"{name}/cells", view.R[index]), step=index)
    if index == INITIAL:
        return {}
    values = compute(record, upto=index, unseen_masked=unseen_masked)
    tracker.metrics({name: v.value for name, v in values.items()}, step=index)
    return values


def log_model(tracker: Tracker, total: int, active: int, step: int) -> None:
    """Number of parameters, and of those that one input uses."""
    tracker.metrics({"model/parameters_total": total, "model/parameters_active": active}, step)


def log_matrices(tracker: Tracker, record: Record, title: str) -> list[Path]:
    """The matrices as tables and pictures; returns the pictures' paths."""
    pictures = []
    everything = {}
    for name, view in views(record).items():
        if not view.evaluated:
            continue
        everything[name] = matrix_json(view, record.names)
        tracker.text(f"figures/matrix_{name}.csv", matrix_csv(view, record.names), "matrix")
        pictures.append(tracker.figure(f"matrix_{name}", figures.heatmap(view, record.names, title)))
        pictures.append(tracker.figure(f"curves_{name}", figures.curves(view, record.names, title)))
    tracker.text("figures/matrix.json", json.dumps(everything, indent=1) + "\n", "matrix")
    return pictures


def log_metrics_table(tracker: Tracker, values: Mapping[str, Value]) -> None:
    """All metrics with the reasons of those that are absent."""
    table = {name: {"value": v.value, "reason": v.reason} for name, v in values.items()}
    tracker.text("figures/metrics.json", json.dumps(table, indent=1) + "\n", "matrix")


def log_experts(
    tracker: Tracker, lives: Sequence[ExpertLife], loads: Sequence[RouterLoad], names: Sequence[str], title: str
) -> list[Path]:
    """The experts' timeline and the routers' load, as pictures and tables; returns the pictures' paths."""
    pictures = []
    if lives:
        columns = [*LIFE, *(f"used_by_{j}" for j in range(len(names)))]
        rows = [[*_life(x), *(x.used.get(j, 0.0) for j in range(len(names)))] for x in lives]
        tracker.text("figures/expert_timeline.csv", _csv(columns, rows), "experts")
        pictures.append(tracker.figure("expert_timeline", figures.expert_timeline(lives, names, title)))
    if loads:
        rows = [
            [load.layer, i, names[i], expert, load.share[i, k]]
            for load in loads
            for i in range(load.share.shape[0])
            for k, expert in enumerate(load.experts)
        ]
        table = _csv(["layer", "experience", "name", "expert", "share"], rows)
        tracker.text("figures/router_load.csv", table, "experts")
        pictures.append(tracker.figure("router_load", figures.router_load(loads, names, title)))
    return pictures


def _life(life: ExpertLife) -> list[Any]:
    """What became of an expert, in the order of `LIFE`; several of a column are joined by blanks."""
    thawed = [str(until) for _, until in life.frozen if until is not None]
    frozen = " ".join(str(begin) for begin, _ in life.frozen)
    tasks = " ".join(map(str, life.tasks))
    first = [life.layer, life.expert, life.origin, life.added]
    return [*first, frozen, " ".join(thawed), life.ended, life.how, life.into, tasks]


def log_diagnostics(tracker: Tracker, documents: Sequence[dict[str, Any]], title: str) -> list[Path]:
    """What was measured of the experts at each row, as tables, and the last row's as pictures; returns their paths.

    Args:
        documents: see `cmoe.tracking.diagnostics`, by row.
        title: second line of the pictures' titles.
    """
    rows = diagnostics.table(documents)
    tracker.text("figures/diagnostics.csv", _csv(diagnostics.COLUMNS, rows), "experts")
    tracker.text("figures/diagnostics.json", json.dumps({"rows": documents}, allow_nan=False) + "\n", "experts")
    pictures, last = [], documents[-1]
    if alike := diagnostics.similarities(last):
        pictures.append(tracker.figure("expert_similarity", figures.similarity(alike, title)))
    if lost := diagnostics.dropped(last):
        pictures.append(tracker.figure("drop_one_expert", figures.drop_one(lost, last["names"], title)))
    if known := diagnostics.calibrations(last):
        pictures.append(tracker.figure("expert_calibration", figures.calibration(known, title)))
    return pictures


def matrix_csv(view: View, names: Sequence[str]) -> str:
    """R as a table: first column the experience trained on, empty where not evaluated, the baseline first."""
    lines = [["untrained", *view.b], *([names[i], *row] for i, row in enumerate(view.R))]
    return _csv(
        ["after", *names], [["" if isinstance(x, float) and np.isnan(x) else x for x in line] for line in lines]
    )


def matrix_json(view: View, names: Sequence[str]) -> dict[str, Any]:
    """R, b and n as plain lists, null where not evaluated."""
    R = [[None if np.isnan(x) else float(x) for x in row] for row in view.R]
    return {
        "names": list(names),
        "R": R,
        "b": [None if np.isnan(x) else float(x) for x in view.b],
        "n": [int(x) for x in view.n],
    }


def _cells(prefix: str, values: np.ndarray) -> dict[str, float | None]:
    return {f"{prefix}/exp_{j:02d}": None if np.isnan(x) else float(x) for j, x in enumerate(values)}


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()
