"""`cmoe sync`: what a dead server missed arrives later, once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cmoe.cli import main
from cmoe.rundir import RunFolder
from cmoe.tracking import store

from .finished import make

DEAD = "http://127.0.0.1:9"  # the port "discard", where nothing listens


@pytest.fixture(scope="module")
def spooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs whose tracking server was down, and one without tracking, beside an empty database."""
    root = tmp_path_factory.mktemp("sync")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", DEAD)
        for seed in (0, 1):
            make(root, "naive", seed=seed, tracking=True)
        make(root, "naive", seed=2)
        patch.delenv("MLFLOW_TRACKING_URI")
        store.prepare(store.locate(root / "mlruns"))
    return root / "mlruns"


@pytest.fixture
def root(spooled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(spooled, tmp_path / "mlruns")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    return tmp_path / "mlruns"


def sync(capsys: Any, root: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main.main(["sync", "--root", str(root), *arguments]) == code
    return capsys.readouterr()


def delivered(root: Path) -> dict[str, Counter]:
    """Run id -> how often each (metric, step) is there, and how often each parameter."""
    location = store.locate(root)
    client = store.client(location)
    found = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            points = [(k, m.step) for k in run.data.metrics for m in client.get_metric_history(run.info.run_id, k)]
            found[run.data.tags[store.RUN_TAG]] = Counter(points)
            assert run.info.status == "FINISHED"
    return found


def logged(folder: RunFolder) -> set[tuple[str, int]]:
    entries = [json.loads(line) for line in folder.wal.read_text().splitlines()]
    return {(k, e["step"]) for e in entries if e["kind"] == "metric" for k in e["values"]}


def test_everything_arrives_once(root: Path, capsys: Any) -> None:
    out, _ = sync(capsys, root)
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert sorted("delivered" in v for v in lines.values()) == [False, True, True]
    assert any("tracking is off" in v for v in lines.values())
    found = delivered(root)
    assert len(found) == 2
    for run, points in found.items():
        assert set(points) == logged(RunFolder(root / "runs" / run))
        assert set(points.values()) == {1}
    out, _ = sync(capsys, root)
    assert sum("nothing new" in line for line in out.splitlines()) == 2
    # even when the cursor is lost, as by a kill between delivery and its note
    for run in found:
        (root / "runs" / run / "delivered.json").unlink()
    sync(capsys, root)
    assert delivered(root) == found


def test_named_runs_only(root: Path, capsys: Any) -> None:
    name = next(p.name for p in sorted((root / "runs").iterdir()) if "-s1-" in p.name)
    out, _ = sync(capsys, root, name[:-3], str(root / "runs" / name), "--json")
    document = json.loads(out)
    assert [r["run"] for r in document["runs"]] == [name]
    assert document["runs"][0]["delivered_bytes"] > 1000
    assert list(delivered(root)) == [name]
    assert "did you mean" in sync(capsys, root, name.replace("naive", "native"), code=2)[1]


def test_a_server_that_does_not_answer(root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"sqlite:///{root}/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # each run knows where it was to go
    out, err = sync(capsys, root, code=1)
    assert len(err.splitlines()) == 1
    assert err.startswith(f"cmoe: {DEAD} cannot be reached, 2 runs wait with nothing lost")
    assert out.count(f"waits for {DEAD}") == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here)
    sync(capsys, root)
    assert len(delivered(root)) == 2


def test_a_run_without_tracking_can_be_delivered_by_asking(root: Path, capsys: Any) -> None:
    out, _ = sync(capsys, root, "--uri", f"sqlite:///{root}/mlflow.db")
    assert out.count("delivered to sqlite") == 3
    assert len(delivered(root)) == 3


def test_no_runs(tmp_path: Path, capsys: Any) -> None:
    assert "no runs in" in sync(capsys, tmp_path / "mlruns", code=2)[1]
    assert not (tmp_path / "mlruns").exists()
