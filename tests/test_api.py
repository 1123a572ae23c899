"""The same from Python: three lines make a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cmoe
from cmoe import api
from cmoe.errors import UserError
from cmoe.rundir import runs

from .drawing import undrawn

CONFIG = {
    "stream": {"name": "split_digits", "limit": 2},
    "trainer": {"max_steps": 2},
    "tracking": {"enabled": False},
    "strategy": {"name": "replay", "size": 20},
}
PLUGIN = '''
from dataclasses import dataclass
from cmoe.streams import Task, class_incremental

@dataclass
class Points(Task):
    """Two clouds of points."""
    modality = "vector"
    size: int = 40

    def benchmark(self, data, seed):
        import torch
        y = torch.arange(self.size) % 2
        x = torch.randn(self.size, 3, generator=torch.Generator().manual_seed(0)) + y[:, None]
        return class_incremental(self, seed, train=(x, y), test=(x, y))
'''


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    undrawn(monkeypatch.setattr)


def test_three_lines(tmp_path: Path) -> None:
    run = cmoe.run(CONFIG, "strategy.0.size=30", "seed=2")
    assert 0 <= run.facts()["metrics"]["class_il/acc_macro"] <= 1
    assert run.facts()["config"]["strategy"][0]["size"] == 30
    assert run.facts()["seed"] == 2
    assert cmoe.resume(run)["status"] == "FINISHED"


def test_the_written_configuration_gives_the_same_plan(tmp_path: Path) -> None:
    run = cmoe.run(CONFIG)
    plan, _ = api.plan_of_run(run)
    again, _ = api.plan_of(run.path / "config.yaml")
    assert plan.to_dict() == again.to_dict() == run.facts()["config"]
    assert plan.hash == again.hash == run.facts()["config_hash"]
    assert plan.hash[:6] in run.id
    repeated = cmoe.run(run.path / "config.yaml")
    assert repeated.facts()["metrics"] == run.facts()["metrics"]


def test_a_plugin_from_a_folder_is_found_again_when_the_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "points.py").write_text(PLUGIN)
    plan, catalogue = api.plan_of({**CONFIG, "stream": "points"}, plugins=["mine"])
    folder = api.new_run(plan)
    assert json.loads((folder.path / "run.json").read_text())["status"] == "CREATED"
    assert api.resume(folder)["status"] == "FINISHED"  # knows the folder from its configuration alone
    assert catalogue.find("task", "points").folder == tmp_path / "mine"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**CONFIG, "straem": "x"}, "<python>: straem"),
        ({"stream": {"name": "split_digits", "limit": "two"}}, "<python>: stream.limit"),
        ("no_such_configuration", "no_such_configuration"),
        ({}, "stream.name"),
    ],
)
def test_wrong_input_is_a_user_error_and_leaves_nothing(config: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        cmoe.run(config)  # ty: ignore[invalid-argument-type]
    assert not (tmp_path / "mlruns").exists()


def test_a_mapping_is_not_changed() -> None:
    before = json.dumps(CONFIG)
    cmoe.run(CONFIG, "trainer.max_steps=1")
    assert json.dumps(CONFIG) == before


def test_extending_gives_what_one_run_gives(tmp_path: Path) -> None:
    run = cmoe.run(CONFIG, "stream.limit=3")
    with pytest.raises(UserError, match="expected 1 to 2 further experiences, got 3"):
        api.extend(run, 3)
    assert run.facts()["status"] == "FINISHED"
    api.extend(run, "all")
    whole = cmoe.run(CONFIG, "stream.limit=0")
    assert run.facts()["metrics"] == whole.facts()["metrics"]
    for path in whole.rows.glob("*.safetensors"):
        assert path.read_bytes() == (run.rows / path.name).read_bytes()
    with pytest.raises(UserError, match="it learned all 5 experiences"):
        api.extend(run, "next")


def test_only_a_finished_run_is_extended(tmp_path: Path) -> None:
    folder = api.new_run(api.plan_of(CONFIG)[0])
    with pytest.raises(UserError, match="expected a finished run, it is CREATED"):
        api.extend(folder, "next")
    assert [r.facts()["status"] for r in runs(tmp_path / "mlruns")] == ["CREATED"]


@pytest.mark.parametrize(
    "target", ["cmoe.rundir.RunFolder.update", "cmoe.session.write_whole", "cmoe.progress.Progress.resume"]
)
def test_an_extension_killed_while_it_begins_can_be_repeated(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cmoe.run(CONFIG)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, killed)
        patch.setattr("cmoe.session.Session._ended", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            api.extend(run, "next")
    if run.facts()["status"] == "FINISHED":
        api.extend(run, "next")
    else:
        api.resume(run)
    assert run.facts()["config"] == api.plan_of_run(run)[0].to_dict()
    assert run.facts()["config"]["stream"]["limit"] == 3
    assert "limit: 3" in (run.path / "config.yaml").read_text()
    assert run.facts()["segments"] == 3
