"""Exact resume: whatever stops a run, it ends as if nothing had."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe import api, checkpoint
from cmoe.cli import main
from cmoe.errors import RunFailed, UserError
from cmoe.rundir import RunFolder, runs
from cmoe.session import Interrupted
from cmoe.tracking import deliver

from .drawing import undrawn

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    "stream": {"name": "split_digits", "limit": 3},
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.1,
              "moe": {"experts": 2, "router": {"name": "topk", "noise": "shazeer"}}},
    "strategy": ["expand", {"name": "replay", "size": 40}],
    "optimizer": {"name": "adam", "lr": 0.003},
    "trainer": {"epochs": 2, "batch_size": 16, "chunk": 3, "log_every": 4},
    "tracking": {"enabled": False},
}  # fmt: skip


def test_twenty_kills_make_no_difference() -> None:
    """The kill test in a process of its own: this one may have computed already (see tests/chaos.py)."""
    command = [sys.executable, "-m", "tests.chaos", "--kills", "20", "--seed", "0", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["differences"] == []
    assert done.returncode == 0
    assert result["kills"] == 20
    assert {"vision expand+replay", "language expand+replay"} <= set(result["scenarios"])


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch.setattr)
        yield


# -- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Stop:
    """Asks a run to stop after so many chunks."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def begin(root: str, stop: Stop | None = None) -> RunFolder:
    plan, catalogue = api.plan_of(CONFIG, [f"tracking.root={root}"])
    folder = api.new_run(plan)
    if stop is None:
        api.start_in(plan, folder, catalogue, api.data_folder())
    else:
        with pytest.raises(Interrupted):
            api.start_in(plan, folder, catalogue, api.data_folder(), stop=stop)
    return folder


def same_end(a: RunFolder, b: RunFolder) -> None:
    """Both finished, with the same weights, rows, metrics and log."""
    first, second = checkpoint.load(a.state), checkpoint.load(b.state)
    assert first is not None
    assert second is not None
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(w, second["model"][n]) for n, w in first["model"].items())
    assert first["structure"] == second["structure"]
    for path in a.rows.glob("*.safetensors"):
        assert path.read_bytes() == (b.rows / path.name).read_bytes()
    assert a.facts()["metrics"] == b.facts()["metrics"]
    assert [x.facts()["status"] for x in (a, b)] == ["FINISHED"] * 2
    assert points(a) == points(b)


def points(run: RunFolder) -> list[tuple[int, str, float]]:
    """What was logged, in order, but for wall-clock times."""
    entries = [json.loads(line) for line in run.wal.read_text().splitlines()]
    return [
        (e["step"], name, value)
        for e in entries
        if e["kind"] == "metric"
        for name, value in e["values"].items()
        if not name.startswith("time/")
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return begin(str(tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("chunks", [0, 1, 5, 12])
def test_a_stopped_run_ends_the_same(chunks: int, reference: RunFolder, here: Path) -> None:
    folder = begin("mlruns", Stop(chunks))
    assert folder.facts()["status"] == "INTERRUPTED"
    with pytest.raises(Interrupted):
        api.resume(folder, stop=Stop(2))
    assert api.resume(folder)["status"] == "FINISHED"
    same_end(reference, folder)


def test_a_damaged_checkpoint_falls_back(reference: RunFolder, here: Path) -> None:
    folder = begin("mlruns", Stop(7))
    before, newest = sorted(folder.state.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    api.resume(folder)
    same_end(reference, folder)
    assert before.name < newest.name


def test_without_any_readable_checkpoint_the_run_says_so(here: Path) -> None:
    folder = begin("mlruns", Stop(2))
    for path in folder.state.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(RunFailed, match="no checkpoint can be read"):
        api.resume(folder)


def test_checkpoints_load_without_unpickling(reference: RunFolder) -> None:
    for path in reference.state.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert state["version"] == checkpoint.VERSION
    assert len(list(reference.state.glob("*.pt"))) == 2  # checkpoint.keep


def test_a_resumed_run_logs_nothing_of_its_settings_again(reference: RunFolder, here: Path) -> None:
    folder = begin("mlruns", Stop(1))
    api.resume(folder)
    kinds = [[json.loads(line)["kind"] for line in run.wal.read_text().splitlines()] for run in (reference, folder)]
    # beside the status KILLED, which the resumed log has no more
    assert kinds[0] == kinds[1]


def test_a_finished_run_is_left_alone(here: Path) -> None:
    folder = begin("mlruns")

    def snapshot() -> dict[str, tuple[bytes, int]]:
        files = (p for p in folder.path.rglob("*") if p.is_file())
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}

    before = snapshot()
    assert api.resume(folder)["status"] == "FINISHED"
    assert main.main(["resume", folder.id]) == 0
    assert snapshot() == before


@pytest.mark.parametrize("moment", ["sync", "commit", "close"])
def test_a_kill_right_after_the_end_loses_nothing_of_the_log(
    here: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Everything is committed, so that it can be delivered, and the log says how the run ended."""
    from cmoe.progress import Progress

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    plan, catalogue = api.plan_of(CONFIG)
    folder, original = api.new_run(plan), getattr(Progress, moment)
    ended: list[str] = []

    def before_the_last(self: Progress, *arguments: object) -> object:
        if ended:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "end", lambda self, status: (ended.append(status), self.tracker.end(status)))
        patch.setattr(Progress, moment, before_the_last)
        patch.setattr("cmoe.session.Session._ended", killed)  # a killed process tidies nothing
        with pytest.raises(Killed):
            api.start_in(plan, folder, catalogue, api.data_folder())
    api.resume(folder)
    entries = [json.loads(line) for line in folder.wal.read_text().splitlines()]
    assert [e["value"] for e in entries if e["kind"] == "status"] == ["FINISHED"]
    assert deliver.committed(folder.path) == folder.wal.stat().st_size


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"data": "0" * 64}, "the data changed"),
        ({"torch": "1.0"}, "torch was 1.0"),
        ({"numpy": "1.0"}, "numpy was 1.0"),
        ({"cpu": "VAX"}, "cpu was VAX"),
        ({"code": "0" * 12}, "code was 000000000000"),
        ({"device": "cuda"}, "device was cuda"),
    ],
)
def test_what_is_not_exact_is_refused(facts: dict[str, str], said: str, reference: RunFolder, here: Path) -> None:
    folder = begin("mlruns", Stop(3))
    newest = sorted(folder.state.glob("*.pt"))[-1]
    state = torch.load(newest, weights_only=True)
    (key, value), *_ = facts.items()
    (state if key == "data" else state["environment"])[key] = value
    del state["version"]
    checkpoint.save(folder.state, state.pop("number"), state, 2)
    with pytest.raises(UserError, match=said) as caught:
        api.resume(folder)
    assert "--anyway" in str(caught.value)
    api.resume(folder, anyway=True)
    same_end(reference, folder)


def test_a_refusal_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin("mlruns", Stop(3))
    before = folder.facts()
    monkeypatch.setattr("cmoe.snapshot.differences", lambda *_: ["torch was 1.0, is 2.0"])
    with pytest.raises(UserError, match="torch was"):
        api.resume(folder)
    assert folder.facts() == before


def test_the_thread_count_is_recorded_and_taken_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        folder = begin("mlruns", Stop(1))
        assert folder.facts()["environment"]["threads"] == 1  # a small model
        torch.set_num_threads(2)
        monkeypatch.setenv("CMOE_MAX_THREADS", "2")
        api.resume(folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_changed_options_of_a_plugin_are_refused(here: Path) -> None:
    folder = begin("mlruns", Stop(1))
    text = (folder.path / "run.json").read_text()
    (folder.path / "run.json").write_text(text.replace('"epochs": 2', '"epochen": 2'))
    with pytest.raises(UserError, match=r"run\.json: trainer\.epochen"):
        api.resume(folder)


@pytest.mark.parametrize("edited", ["anchor.py", "_helper.py"])
def test_an_edited_plugin_is_another_computation(here: Path, edited: str) -> None:
    """Its source is part of what makes a resumed run exact, and of what makes two runs the same."""
    (here / "tasks").mkdir()
    (here / "tasks" / "_helper.py").write_text("X = 1\n")
    (here / "tasks" / "anchor.py").write_text(
        'from cmoe.strategies import Strategy\n\n\nclass Anchor(Strategy):\n    """Does nothing."""\n'
    )
    config = {**CONFIG, "strategy": "anchor"}
    plan, catalogue = api.plan_of(config)
    folder = api.new_run(plan)
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, api.data_folder(), stop=Stop(1))
    assert api.plan_of(config)[0].hash == plan.hash
    with (here / "tasks" / edited).open("a") as file:
        file.write("# changed\n")
    assert api.plan_of(config)[0].hash != plan.hash
    with pytest.raises(UserError, match=r"plugins was .*--anyway"):
        api.resume(folder)
    assert api.resume(folder, anyway=True)["status"] == "FINISHED"


def _hold(path: Path, ready: Any) -> None:
    with RunFolder(path).working():
        ready.set()
        time.sleep(60)


def test_a_second_process_is_refused(reference: RunFolder, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begin("mlruns", Stop(1))
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder.path, ready))
    holder.start()
    try:
        assert ready.wait(30)
        assert main.main(["resume", folder.id]) == 2
        assert "another process is working on it" in capsys.readouterr().err
        assert folder.facts()["status"] == "INTERRUPTED"
    finally:
        holder.kill()
        holder.join()
    api.resume(folder)
    same_end(reference, folder)


def test_a_run_killed_before_its_first_checkpoint_starts_again(reference: RunFolder, here: Path) -> None:
    plan, _ = api.plan_of(CONFIG)
    folder = api.new_run(plan)
    assert api.resume(folder)["status"] == "FINISHED"
    same_end(reference, folder)


def test_the_error_of_a_failed_run_is_gone_when_it_is_finished(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, catalogue = api.plan_of(CONFIG)
    folder = api.new_run(plan)

    def broken(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("cmoe.session.Session.evaluate", broken)
        with pytest.raises(OSError, match="no room"):
            api.start_in(plan, folder, catalogue, api.data_folder())
    assert folder.facts()["error"] == "OSError: no room"
    api.resume(folder)
    assert not folder.facts().get("error")


def test_ctrl_c_stops_cleanly_and_resume_finishes(reference: RunFolder, here: Path) -> None:
    """A real process, a real signal."""
    (here / "c.yaml").write_text(json.dumps(CONFIG))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "cmoe.cli.main", "run", "c.yaml", "trainer.epochs=300", "--json"]
    process = subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "] run " in line:  # it trains
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    (folder,) = runs(here / "mlruns")
    assert process.returncode == 130, err
    assert "stopping after this chunk" in err
    assert f"cmoe: interrupted; go on with: cmoe resume {folder.id}" in err
    assert "Traceback" not in err
    assert json.loads(out)["interrupted"] == folder.id
    facts = folder.facts()
    assert facts["status"] == "INTERRUPTED"
    assert facts["environment"]["threads"] == 1
    state = checkpoint.load(folder.state)
    assert state is not None
    assert state["position"]["loader"]["done"] > 0
    with pytest.raises(Interrupted):  # goes on from there, in any process
        api.resume(folder, stop=Stop(3))
    after = checkpoint.load(folder.state)
    assert after is not None
    assert after["steps"] > state["steps"]
