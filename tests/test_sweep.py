"""Many runs, several processes: order, what is skipped, what failed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cmoe import api, checkpoint
from cmoe.rundir import runs
from cmoe.sweep import PRELOAD, Job, earlier, sweep

STRATEGY = "from cmoe.strategies import Strategy\nclass Fails(Strategy):\n    '''Fails.'''\n    def after_experience(self, segment):\n        1 / 0\n"
DIES = "from cmoe.strategies import Strategy\nclass Dies(Strategy):\n    '''Dies.'''\n    def after_experience(self, segment):\n        import os\n        os._exit(7)\n"  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """A fork server of this module's own, importing no more than the runs here need."""
    import cmoe.sweep

    setattr(cmoe.sweep, "PRELOAD", ("cmoe.session", "cmoe.runner", "sklearn.datasets"))  # noqa: B010
    yield
    setattr(cmoe.sweep, "PRELOAD", PRELOAD)  # noqa: B010


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "fails.py").write_text(STRATEGY)
    (tmp_path / "plugins" / "dies.py").write_text(DIES)
    return tmp_path


def job(folder: Path, *overrides: str) -> Job:
    config: dict[str, Any] = {
        "stream": {"name": "split_digits", "limit": 2},
        "trainer": {"max_steps": 3},
        "tracking": {"enabled": False, "root": str(folder / "mlruns")},
    }
    plan, _ = api.plan_of(config, overrides, [folder / "plugins"])
    return Job(plan, f"{plan.label} s{plan.seed}")


class Log:
    """What a sweep told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, job: Job, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append((job.name, name))


def test_a_sweep_from_start_to_end(folder: Path) -> None:
    data = api.data_folder(folder)
    log = Log()
    jobs = [job(folder, "seed=0"), job(folder, "seed=1"), job(folder, "strategy=fails"), job(folder, "strategy=dies")]
    sweep(jobs, data, 2, log)
    assert [j.status for j in jobs] == ["finished", "finished", "failed", "failed"]
    assert jobs[2].error is not None
    assert "ZeroDivisionError" in jobs[2].error
    assert jobs[3].error == "its process ended with exit code 7"
    assert [n for n, call in log.calls if call == "ended"] != []
    assert {n for n, call in log.calls if call == "ended"} == {j.name for j in jobs}
    assert log.calls.index(("naive s0", "started")) < log.calls.index(("fails s0", "started"))
    assert {r.facts()["status"] for r in runs(folder / "mlruns") if r.facts()["label"] == "fails"} == {"FAILED"}

    # the same as alone in this process
    alone = job(folder, "seed=1", f"tracking.root={folder / 'alone'}").plan
    facts = api.start(alone, api.plan_of({"stream": "split_digits"})[1], data)
    assert jobs[1].facts is not None
    assert jobs[1].facts["metrics"] == facts["metrics"]
    ids = [next(r for r in runs(folder / root) if r.facts()["seed"] == 1) for root in ("mlruns", "alone")]
    states = [checkpoint.load(r.state) for r in ids]
    assert states[0] is not None
    assert states[1] is not None
    assert all((w == states[1]["model"][n]).all() for n, w in states[0]["model"].items())

    # a second time: what is finished is skipped, what failed is taken up, what is new runs
    (folder / "plugins" / "fails.py").write_text(STRATEGY.replace("1 / 0", "pass"))
    log = Log()
    jobs = [job(folder, "seed=0"), job(folder, "seed=1"), job(folder, "strategy=fails"), job(folder, "seed=2")]
    sweep(jobs, data, 2, log)
    assert [j.status for j in jobs] == ["skipped", "skipped", "finished", "finished"]
    assert all(j.run_id and j.facts and j.facts["status"] == "FINISHED" for j in jobs)
    assert log.calls[:2] == [("naive s0", "skipped"), ("naive s1", "skipped")]
    # the mended plugin is another computation: the run that failed stays beside the new one
    assert len(runs(folder / "mlruns")) == 6

    # stopped before anything began: nothing is lost, nothing runs
    jobs = [job(folder, "seed=3"), job(folder, "seed=4")]
    sweep(jobs, data, 2, log, stop=lambda: True)
    assert [j.status for j in jobs] == ["waiting", "waiting"]
    # the mended plugin is another computation: the run that failed stays beside the new one
    assert len(runs(folder / "mlruns")) == 6

    # stopped under way: the run is saved, and the next sweep goes on with it
    asked = False

    def stop() -> bool:
        return asked

    def event(job: Job, name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal asked
        asked = asked or name == "progress"

    jobs = [job(folder, "seed=5", "trainer.max_steps=0", "trainer.epochs=200", "trainer.chunk=1")]
    sweep(jobs, data, 1, event, stop)
    assert [j.status for j in jobs] == ["interrupted"]
    saved = earlier(jobs[0].plan)
    assert saved is not None
    assert saved.facts()["status"] == "INTERRUPTED"
    assert not multiprocessing.active_children()


def test_earlier_prefers_a_finished_run(folder: Path) -> None:
    plan = job(folder).plan
    assert earlier(plan) is None
    first, second = api.new_run(plan), api.new_run(plan)
    found = earlier(plan)
    assert found is not None
    assert found.id == second.id
    first.update(status="FINISHED")
    found = earlier(plan)
    assert found is not None
    assert found.id == first.id
    assert earlier(job(folder, "seed=1").plan) is None
    assert earlier(job(folder, "experiment=other").plan) is None
    assert earlier(job(folder, "checkpoint.keep=5").plan) is not None  # makes no other result
