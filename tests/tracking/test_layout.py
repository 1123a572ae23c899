"""What MLflow shows of a run."""

from __future__ import annotations

import csv
import json
import subprocess

import numpy as np

from cmoe.metrics import compute, view
from cmoe.tracking import layout, store
from cmoe.tracking.figures import ExpertLife, RouterLoad

from .helpers import histories, tracker
from .runs import NAMES, record

CONFIG = {
    "experiment": "digits",
    "seed": 3,
    "strategy": [{"name": "replay", "size": 200}, {"name": "ewc"}],
    "stream": {"name": "split_digits", "class_order": [1, 0], "limit": None},
    "model": {"moe": {}},
}


def test_flatten():
    assert layout.flatten(CONFIG) == {
        "experiment": "digits",
        "seed": "3",
        "strategy.0.name": "replay",
        "strategy.0.size": "200",
        "strategy.1.name": "ewc",
        "stream.name": "split_digits",
        "stream.class_order": "[1, 0]",
        "stream.limit": "null",
        "model.moe": "{}",
    }


def test_everything_has_its_place(location):
    t = tracker(location)
    t.run_dir.mkdir(parents=True)
    (t.run_dir / "config.yaml").write_text("seed: 3\n")
    layout.log_start(t, CONFIG, "replay+ewc", "ER", data=("digits", "f" * 64), commit="abc+")
    made = record(0.7, 0)
    for i in range(-1, 3):
        layout.log_row(t, made, i)
    layout.log_model(t, 100, 50, 2)
    pictures = layout.log_matrices(t, made, "run-a")
    layout.log_metrics_table(t, compute(made))
    frozen = [((1, None),), ((2, None),), ()]
    lives = [ExpertLife("block", e, e, frozen=frozen[e], used={e: 1.0}) for e in range(3)]
    pictures += layout.log_experts(t, lives, [RouterLoad("block", (0, 1, 2), np.eye(3))], NAMES, "run-a")
    assert t.finish("FINISHED")

    points, run = histories(location)
    R = view(made, "class_il").R
    for j in range(3):
        assert points[f"class_il/cells/exp_{j:02d}"] == [(i, R[i, j]) for i in range(3)]
        assert points[f"class_il/baseline/exp_{j:02d}"] == [(0, view(made, "class_il").b[j])]
    for i in range(3):
        for name, value in compute(made, upto=i).items():
            logged = dict(points.get(name, [])).get(i)
            assert logged == value.value, name
    assert points["model/parameters_total"] == [(2, 100.0)]
    assert run.data.params["strategy"] == "replay+ewc"
    assert run.data.params["strategy.0.size"] == "200"
    assert run.data.params["label"] == "ER"
    assert run.data.params["seed"] == "3"
    assert run.data.tags["git.commit"] == "abc+"
    assert run.data.tags["version.torch"]
    client = store.client(location)
    files = {
        a.path
        for folder in ("", "matrix", "figures", "experts")
        for a in client.list_artifacts(run.info.run_id, folder)
    }
    assert {
        "config.yaml", "matrix/matrix_class_il.csv", "matrix/matrix.json", "matrix/metrics.json",
        "figures/matrix_class_il.png", "figures/curves_class_il.png", "figures/expert_timeline.png",
        "figures/router_load.png", "experts/expert_timeline.csv", "experts/router_load.csv",
    } <= files  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_tables_hold_the_matrix(tmp_path):
    made = record(0.7, 1)
    made.rows[1].columns.pop(2)
    v = view(made, "class_il")
    rows = list(csv.reader(layout.matrix_csv(v, NAMES).splitlines()))
    assert rows[0] == ["after", *NAMES]
    assert [row[0] for row in rows[1:]] == ["untrained", *NAMES]
    assert rows[3][3] == ""
    assert float(rows[4][1]) == v.R[2, 0]
    document = json.loads(json.dumps(layout.matrix_json(v, NAMES)))
    assert document["R"][1][2] is None
    assert document["R"][2][0] == v.R[2, 0]
    assert document["n"] == [50, 50, 50]


def test_git_commit_tells_changed_files(tmp_path):
    assert layout.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = layout.git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert layout.git_commit(tmp_path) == f"{clean}+"
