"""A run as its folder tells it: `run.json` and the recorded predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmoe.errors import RunFailed, UserError, nearest
from cmoe.metrics.matrix import View, views
from cmoe.metrics.record import Record
from cmoe.tracking import diagnostics
from cmoe.tracking.files import read_json


@dataclass
class RunSummary:
    """One run.

    Attributes:
        run_id, experiment, label, seed, status: what `run.json` says.
        config: the resolved configuration.
        metrics: value by name, None where absent.
        reasons: why a metric is absent, by name.
        matrices: by view; empty when the predictions are not there.
        experts: what was measured of experts in the last row, see `cmoe.tracking.diagnostics`; None when nothing was.
        names: of the experiences.
        parameters_total, parameters_active, wall_seconds: None when not known.
    """

    run_id: str
    experiment: str
    label: str
    seed: int
    status: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, View] = field(default_factory=dict)
    experts: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    parameters_total: int | None = None
    parameters_active: int | None = None
    wall_seconds: float | None = None
    created: str | float | None = None
    finished: str | float | None = None


def read_run(folder: Path, matrices: bool = True) -> RunSummary | None:
    """The summary of a run's folder; None when it has no (whole) `run.json`."""
    about = read_json(Path(folder) / "run.json", None)
    if not isinstance(about, dict) or not {"run_id", "experiment", "seed", "status"} <= about.keys():
        return None
    known = {k: about[k] for k in RunSummary.__dataclass_fields__ if k in about and about[k] is not None}
    summary = RunSummary(**{"label": about["run_id"], **known})
    if matrices:
        try:
            record = Record.load(Path(folder) / "rows")
        except RunFailed:
            return summary
        summary.names = record.names
        summary.matrices = {k: v for k, v in views(record).items() if v.evaluated}
        summary.experts = next(iter(diagnostics.load(Path(folder) / "rows", [record.last])), None)
    return summary


def load_runs(root: Path, experiment: str, finished: bool = True, matrices: bool = True) -> list[RunSummary]:
    """The runs of an experiment under `<root>/runs`, in order of their labels' first run, then of their creation.

    Raises:
        UserError: there is no such experiment, or none of its runs is finished.
    """
    runs = [read_run(path.parent, matrices=False) for path in sorted((Path(root) / "runs").glob("*/run.json"))]
    found = [run for run in runs if run]
    own = [run for run in found if run.experiment == experiment]
    if not own:
        names = sorted({run.experiment for run in found})
        here = f"there are: {', '.join(names)}" if names else "there are no runs yet"
        raise UserError(
            f"{Path(root) / 'runs'}: expected runs of the experiment '{experiment}'; {here}{nearest(experiment, names)}"
        )
    done = [run for run in own if run.status == "FINISHED"] if finished else own
    if not done:
        states = ", ".join(sorted({run.status for run in own}))
        raise UserError(f"{experiment}: expected finished runs, its {len(own)} runs are {states}")
    done.sort(key=lambda r: str(r.created or ""))
    first = {run.label: i for i, run in reversed(list(enumerate(done)))}
    done.sort(key=lambda r: first[r.label])  # stable: by creation within a label
    if not matrices:
        return done
    return [full for run in done if (full := read_run(Path(root) / "runs" / run.run_id))]
