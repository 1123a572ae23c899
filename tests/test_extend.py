"""A finished run goes on learning, and ends as one that knew all from the start (bar: same weights, same matrix)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cmoe import api
from cmoe.errors import UserError
from cmoe.rundir import RunFolder
from cmoe.streams.data import data_folder

from .drawing import undrawn

SETTINGS = {
    "expand and replay, learned router": ["strategy=[expand,replay]", "model.moe={experts: 2}", "model.dropout=0.1"],
    "expand by task label": ["stream.scenario=task", "strategy=expand", "model.moe={experts: 1, router: task_table}"],
    "growing head, online EWC": ["model.head=growing", "strategy=[online_ewc,replay]"],
    "LwF": ["model.head=growing", "model.train_outputs=seen", "strategy=[{name: lwf, warm_up: true}]"],
    "optimizer goes on": ["optimizer={name: adam}", "optimizer.reset=never", "strategy=replay"],
    "networks of their own": ["stream.scenario=task", "strategy=separate"],
    "class means": ["model.head=growing", "strategy=slda"],
    "weights of tasks": ["stream.scenario=task", "strategy=packnet"],
    "attention of tasks": ["stream.scenario=task", "strategy=[hat,online_ewc]"],
}


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch.setattr)
        yield


def trained(root: Path, *overrides: str) -> RunFolder:
    base = ["trainer.max_steps=12", "tracking.enabled=false", f"tracking.root={root}"]
    plan, catalogue = api.plan_of({"stream": "split_digits", "model": "mlp"}, [*base, *overrides])
    folder = api.new_run(plan)
    api.start_in(plan, folder, catalogue, data_folder(root))
    return folder


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(sorted(folder.state.glob("*.pt"))[-1], weights_only=True)["model"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_four_experiences_and_the_fifth_are_five(setting: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, *SETTINGS[setting])
    part = trained(tmp_path, *SETTINGS[setting], "stream.limit=4")
    assert part.facts()["segments"] == 4
    facts = api.extend(part, "next")
    assert facts["status"] == "FINISHED"
    a, b = weights(whole), weights(part)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for row in sorted(whole.rows.glob("*")):
        assert row.read_bytes() == (part.rows / row.name).read_bytes(), row.name
    assert whole.facts()["metrics"] == part.facts()["metrics"]


def test_another_task_follows_with_new_classes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 17, (60, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "more.npz", x=x, y=np.arange(60) % 2)
    run = trained(tmp_path, "strategy=replay")
    before = sorted(p.name for p in run.rows.glob("row_*"))
    facts = api.extend(run, {"name": "arrays", "path": "more.npz", "experiences": 1}, data_folder(tmp_path))
    assert sorted(p.name for p in run.rows.glob("row_*")) == [*before[:5], "row_0005.safetensors", *before[5:]]
    assert facts["config"]["stream"]["then"][0]["name"] == "arrays"
    assert "class_il/acc_macro" in facts["metrics"]
    assert weights(run)["head.blocks.1.weight"].shape[0] == 2  # the shared head got the new classes' outputs


@pytest.mark.parametrize(
    ("overrides", "task", "message"),
    [
        ([], "next", "learned all 5 experiences"),
        (["stream.limit=4"], 3, "expected 1 to 1 further experiences, got 3"),
        (["stream.limit=4"], "arrays", "its own stream is not complete"),
        ([], "split_digitz", "did you mean 'split_digits'"),
        ([], {"name": "arrays", "path": "none.npz"}, "none.npz"),
        (["strategy=joint"], "next", "'joint' cannot go on"),
    ],
)
def test_what_cannot_go_on_is_refused_and_the_run_stays(
    overrides: list[str], task: object, message: str, tmp_path: Path
) -> None:
    run = trained(tmp_path, *overrides)
    before = run.facts()
    with pytest.raises(UserError, match=message):
        api.extend(run, task, data_folder(tmp_path))  # ty: ignore[invalid-argument-type]
    assert run.facts() == before


@pytest.mark.parametrize("what", ["code", "data"])
def test_a_refused_extension_changes_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, "stream.limit=2")

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}

    before = files()
    with monkeypatch.context() as patch:
        if what == "code":
            patch.setattr("cmoe.snapshot.differences", lambda *_: ["code was a, is b"])
        else:
            original = torch.load
            patch.setattr(torch, "load", lambda *a, **k: {**original(*a, **k), "data": "another"})
        with pytest.raises(UserError, match="--anyway"):
            api.extend(run, "next", data_folder(tmp_path))
    assert files() == before
    assert api.extend(run, "next", data_folder(tmp_path))["status"] == "FINISHED"


def test_mlflow_learns_of_the_new_settings(tmp_path: Path) -> None:
    from cmoe.tracking import store

    run = trained(tmp_path, "stream.limit=2", "tracking.enabled=true")
    api.extend(run, "next", data_folder(tmp_path))
    location = store.locate(tmp_path)
    client = store.client(location)
    found = store.find_run(client, store.experiment(client, location, run.facts()["experiment"]).experiment_id, run.id)
    assert found is not None
    data = client.get_run(found).data
    assert data.params["stream.limit"] == "2"
    assert data.tags["changed.stream.limit"] == "3"
    (config,) = (tmp_path / "artifacts").rglob("config.yaml")
    assert "limit: 3" in config.read_text()
    assert config.read_bytes() == (run.path / "config.yaml").read_bytes()
