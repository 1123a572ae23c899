"""What the settings of a run do to its rows, its segments and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmoe import api, checkpoint
from cmoe.errors import RunFailed, UserError
from cmoe.metrics import Record
from cmoe.reporting import Reporter
from cmoe.rundir import RunFolder, runs
from cmoe.session import Interrupted, Session

from .drawing import undrawn

BASE: dict[str, Any] = {
    "stream": {"name": "split_digits"},
    "model": {"name": "mlp", "hidden": [16]},
    "trainer": {"max_steps": 4, "batch_size": 16, "chunk": 2, "log_every": 2},
    "tracking": {"enabled": False},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    undrawn(monkeypatch.setattr)


def run(*overrides: str, reporter: Reporter | None = None) -> RunFolder:
    return api.run(BASE, *overrides, reporter=reporter)


def record(folder: RunFolder) -> Record:
    return Record.load(folder.rows)


def columns(folder: RunFolder) -> dict[int, list[int]]:
    return {i: list(row.columns) for i, row in record(folder).rows.items()}


def entries(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, folder.wal.read_text().splitlines()) if e["kind"] == kind]


EVERY = list(range(5))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), dict.fromkeys(range(-1, 5), EVERY)),
        (("evaluation.initial=false",), dict.fromkeys(range(5), EVERY)),
        (("evaluation.rows=seen",), {-1: EVERY, **{i: list(range(i + 1)) for i in range(5)}}),
        (("evaluation.every=2",), {-1: EVERY, 1: EVERY, 3: EVERY, 4: EVERY}),
        (("evaluation.every=99",), {-1: EVERY, 4: EVERY}),
        (("stream.limit=2",), {-1: EVERY, 0: EVERY, 1: EVERY}),
        (("stream.limit=3", "evaluation.every=2", "evaluation.rows=seen"), {-1: EVERY, 1: [0, 1], 2: [0, 1, 2]}),
        (("stream.scenario=joint",), {-1: EVERY, 4: EVERY}),
        (("stream.scenario=joint", "stream.limit=2"), {-1: EVERY, 1: EVERY}),
        (("strategy=joint",), {-1: EVERY, 4: EVERY}),
        (("stream.scenario=online",), dict.fromkeys(range(-1, 5), EVERY)),
        (("model.head=growing",), dict.fromkeys(range(5), EVERY)),  # without outputs there is nothing to evaluate
    ],
)
def test_rows_and_columns(overrides: tuple[str, ...], expected: dict[int, list[int]]) -> None:
    folder = run(*overrides)
    assert columns(folder) == expected
    facts = folder.facts()
    assert facts["status"] == "FINISHED"
    assert facts["run_id"] == folder.id
    assert facts["wall_seconds"] > 0
    assert facts["parameters_total"] >= facts["parameters_active"] > 0
    assert all((folder.path / p).exists() for p in facts["pictures"])
    steps = {e["step"] for e in entries(folder, "metric") for n in e["values"] if n == "class_il/acc_macro"}
    assert steps == {i for i in expected if i >= 0}
    assert not list(folder.state.glob("*.tmp"))


def test_the_validation_split_is_evaluated_instead() -> None:
    test, validation = run("stream.limit=1"), run("stream.limit=1", "evaluation.split=validation")
    sizes = [[len(t) for t in record(f).targets] for f in (test, validation)]
    assert sizes[0] != sizes[1]
    assert all(n > 0 for n in sizes[1])


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_evaluation_batch_changes_no_prediction(size: int) -> None:
    a, b = run("stream.limit=1"), run("stream.limit=1", f"evaluation.batch_size={size}")
    for row, other in zip(record(a).rows.values(), record(b).rows.values(), strict=True):
        for j in row.columns:
            pred, same = row.columns[j].pred, other.columns[j].pred
            assert pred is not None
            assert same is not None
            assert np.array_equal(pred, same)


def test_the_same_plan_gives_the_same_run_and_another_seed_another() -> None:
    a, b, c = run(), run(), run("seed=1")
    assert b.id == f"{a.id}-2"
    states = [checkpoint.load(f.state) for f in (a, b, c)]
    weights = [torch.cat([w.flatten() for w in s["model"].values()]) for s in states if s is not None]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert a.facts()["metrics"] == b.facts()["metrics"]


@pytest.mark.parametrize("override", ["checkpoint.every_seconds=0.0001", "trainer.chunk=1", "checkpoint.keep=1"])
def test_how_work_is_cut_changes_no_weight(override: str) -> None:
    states = [checkpoint.load(run(*o).state) for o in ((), (override,))]
    assert states[0] is not None
    assert states[1] is not None
    assert all(torch.equal(w, states[1]["model"][n]) for n, w in states[0]["model"].items())


def test_checkpoints_between_chunks_are_written_and_thinned_out() -> None:
    folder = run("checkpoint.every_seconds=0.0001", "checkpoint.keep=3")
    numbers = [int(p.stem.rpartition("-")[2]) for p in sorted(folder.state.glob("*.pt"))]
    assert len(numbers) == 3
    assert numbers[-1] == 1 + 5 * (2 + 1)  # at the start; after both chunks of each experience, and at its end


def test_training_curves_have_the_global_step() -> None:
    folder = run()
    steps = [e["step"] for e in entries(folder, "metric") if "train/loss" in e["values"]]
    assert steps == list(range(2, 21, 2))
    assert not [e for e in entries(run("trainer.log_every=0"), "metric") if "train/loss" in e["values"]]


class Told(Reporter):
    """Remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def started(self, run_id: str, facts: dict[str, Any]) -> None:
        self.calls.append(("started", run_id))

    def segment(self, number: int, total: int, name: str, resumed: bool) -> None:
        self.calls.append(("segment", number, total, name, resumed))

    def row(self, row: int, values: dict[str, float]) -> None:
        self.calls.append(("row", row, "class_il/acc_macro" in values))

    def finished(self, facts: dict[str, Any]) -> None:
        self.calls.append(("finished", facts["status"]))


def test_the_reporter_hears_of_every_segment_and_row() -> None:
    told = Told()
    folder = run("stream.limit=2", "evaluation.every=2", reporter=told)
    assert told.calls == [
        ("started", folder.id),
        ("segment", 0, 2, "0+1", False),
        ("row", 0, False),
        ("segment", 1, 2, "2+3", False),
        ("row", 1, True),
        ("finished", "FINISHED"),
    ]


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    for overrides in (["stream.experiences=3"], ["stream={name: arrays, path: nowhere.npz}"]):
        with pytest.raises(UserError):
            run(*overrides)
    assert runs(tmp_path / "mlruns") == []
    assert list((tmp_path / "mlruns" / "runs").iterdir()) == []


def test_a_run_that_had_begun_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("not now")

    monkeypatch.setattr(Session, "evaluate", refuse)
    with pytest.raises((UserError, RunFailed), match="not now"):
        run()
    (folder,) = runs(tmp_path / "mlruns")
    assert folder.facts()["status"] == "FAILED"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert api.resume(folder)["status"] == "FINISHED"


def test_data_is_looked_for_where_the_run_found_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "a.npz", x=np.random.default_rng(0).normal(size=(40, 6)), y=np.arange(40) % 2)
    plan, catalogue = api.plan_of({**BASE, "stream": {"name": "arrays", "path": "a.npz"}})
    folder = api.new_run(plan)
    stopped = iter([False, True])
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, api.data_folder(tmp_path / "elsewhere"), stop=lambda: next(stopped, True))
    assert api.resume(folder)["status"] == "FINISHED"
    np.savez(tmp_path / "elsewhere" / "a.npz", x=np.zeros((40, 6)), y=np.arange(40) % 2)
    folder.update(status="INTERRUPTED")
    with pytest.raises(UserError, match="the data changed"):
        api.resume(folder)
