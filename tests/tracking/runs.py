"""Finished runs on disk, with a matrix each."""

from __future__ import annotations

import json

import numpy as np

from cmoe.metrics import Column, Record, compute

NAMES = ["zero", "one", "two"]
KEEP = {"naive": 0.2, "replay": 0.8}


def record(keep, seed, masked=False):
    rng = np.random.default_rng([seed, int(100 * keep)])
    classes = [(0, 1), (2, 3), (4, 5)]
    targets = [rng.choice(c, 50) for c in classes]
    out = Record("classification", NAMES, classes, targets)
    for i in range(-1, 3):
        columns = {}
        for j in range(3):
            right = rng.random(50) < (0.1 if j > i else keep ** (i - j))
            columns[j] = Column(pred=np.where(right, targets[j], (targets[j] + 2) % 6), confidence=rng.random(50))
        out.add_row(i, columns)
    return out


def write_run(root, label, seed, experiment="digits", status="FINISHED", keep=None, created=0.0, **extra):
    run_id = extra.pop("run_id", f"{experiment}-{label}-s{seed}-aaaaaa")
    folder = root / "runs" / run_id
    made = record(KEEP.get(label, 0.5) if keep is None else keep, seed)
    made.save_targets(folder / "rows")
    for i in made.rows:
        made.save_row(folder / "rows", i)
    values = compute(made)
    about = {
        "run_id": run_id,
        "experiment": experiment,
        "label": label,
        "seed": seed,
        "status": status,
        "config": {"seed": seed, "strategy": [{"name": label}]},
        "metrics": {k: v.value for k, v in values.items()},
        "reasons": {k: v.reason for k, v in values.items() if v.reason},
        "created": created,
        "finished": created + 1,
        "parameters_total": 1000 + seed,
        "parameters_active": 500,
        "wall_seconds": 2.5,
        **extra,
    }
    (folder / "run.json").write_text(json.dumps(about))
    return folder
