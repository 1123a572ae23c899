"""What joint, cumulative and separate training see, and where their weights begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cmoe.session
from cmoe.errors import UserError
from cmoe.session import Session

from .helpers import metrics, opened, run, same, weights

HEADS: dict[str, dict[str, Any]] = {
    "shared": {},
    "growing": {"model": {"head": "growing"}, "stream": {"class_order": "shuffled"}},
    "multi": {"stream": {"scenario": "task"}},
}


QUICK = {"evaluation": {"initial": False, "rows": "seen"}}


class Fits:
    """Stands in for training: notes what a fit would train on and from which weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, draws: int = 0, shift: float = 0.0) -> None:
        self.rows: list[list[int]] = []
        self.begun: list[dict[str, Tensor]] = []

        def fit(learner: Any, loader: Any, *_: Any) -> None:
            chunks = list(loader)
            self.rows.append(sorted(int(i) for chunk in chunks for ids in chunk.ids for i in ids))
            self.begun.append({n: v.clone() for n, v in learner.model.state_dict().items()})
            torch.rand(draws)
            with torch.no_grad():
                for p in learner.model.parameters():
                    p.add_(shift)

        monkeypatch.setattr(cmoe.session, "fit", fit)


def rows_of(of: Session, experiences: range) -> list[int]:
    return sorted(int(i) for e in experiences for i in of.stream.experiences[e].train.index)


@pytest.mark.parametrize("head", HEADS)
def test_joint_trains_once_on_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    fits = Fits(monkeypatch)
    of = run(tmp_path, {"strategy": "joint"}, HEADS[head])
    assert [s.experiences for s in of.segments] == [(0, 1, 2, 3, 4)]
    assert fits.rows == [rows_of(of, range(5))]
    assert [row for row in of.record.rows if row >= 0] == [4]
    assert sorted(of.record.rows[4].columns) == [0, 1, 2, 3, 4]
    assert sorted(of.context.seen) == list(range(10))


def test_joint_mixes_the_experiences_in_every_batch(tmp_path: Path) -> None:
    of = run(tmp_path, {"strategy": "joint", "stream": {"scenario": "task"}})
    mixed = [len(set(task.tolist())) for chunk in of.loader for task in chunk.task]
    assert sum(mixed) / len(mixed) > 3
    assert metrics(of)["task_il/acc_macro"] > 0.8


def test_joint_is_the_joint_scenario(tmp_path: Path) -> None:
    strategy = run(tmp_path, {"strategy": "joint"})
    scenario = run(tmp_path, {"stream": {"scenario": "joint"}, "model": {"head": "shared"}})
    assert same(weights(strategy), weights(scenario))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_cumulative_trains_on_all_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, restart: bool
) -> None:
    fits = Fits(monkeypatch, shift=0.25)
    of = run(tmp_path, {"strategy": {"name": "cumulative", "restart": restart}, "stream": {"limit": 3}}, HEADS[head])
    assert fits.rows == [rows_of(of, range(e + 1)) for e in range(3)]
    for before, now in zip(fits.begun, fits.begun[1:], strict=False):
        for name in before:
            went_on = torch.equal(now[name], before[name] + 0.25)
            assert went_on != restart, name
            if restart:
                assert float(now[name].abs().sum()) > 0, "weights are drawn, not zero"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strategy", [{"name": "cumulative", "restart": True}, {"name": "separate"}])
def test_a_restart_does_not_depend_on_what_was_before(tmp_path: Path, head: str, strategy: dict[str, Any]) -> None:
    """New weights come from seeds of their own, however many random numbers training drew; other seeds differ."""
    begun = []
    for draws, shift, seed in ((0, 0.0, 0), (7, 0.5, 0), (0, 0.0, 1)):
        with pytest.MonkeyPatch.context() as patch:
            fits = Fits(patch, draws, shift)
            run(tmp_path, {"strategy": strategy, "stream": {"limit": 3}, "seed": seed}, HEADS[head], QUICK)
        begun.append(fits.begun)
    for first, again, other in zip(*begun, strict=True):
        assert same(first, again)
        assert not any(torch.equal(v, other[n]) for n, v in first.items() if n in other)
    assert not any(torch.equal(v, begun[0][2][n]) for n, v in begun[0][1].items())


def test_a_restart_keeps_the_protocols_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Glorot's range of the outputs is wider than torch's own: weights beyond the latter show which was drawn."""
    fits = Fits(monkeypatch)
    run(tmp_path, {"strategy": {"name": "cumulative", "restart": True}, "model": {"init": "xavier"}})
    for state in fits.begun:
        assert float(state["head.blocks.0.weight"].abs().max()) > 1.05 / 16**0.5


@pytest.mark.parametrize("head", ["multi", "growing"])
def test_separate_networks_never_forget(tmp_path: Path, head: str) -> None:
    made: list[dict[str, Tensor]] = []
    of = run(tmp_path, {"strategy": "separate"}, HEADS[head], on_row=lambda of, row: made.append(weights(of)))
    assert len(made) == 5
    for row in range(5):
        assert "pred" not in of.record.rows[row].columns[0].arrays(), "without the label there is no network to choose"
        for e in range(row):
            now, then = of.record.rows[row].columns[e].arrays(), of.record.rows[e].columns[e].arrays()
            assert now.keys() == then.keys() == {"task_pred", "task_confidence"}
            assert all(np.array_equal(now[k], then[k]) for k in now)
    if head == "multi":  # where outputs grow, later experiences have no prediction before they come
        assert metrics(of)["task_il/forgetting_chaudhry"] == 0.0
    assert metrics(of)["task_il/acc_macro"] > 0.7
    (strategy,) = of.strategies
    parameters = [sum(v.numel() for v in state.values()) for state in made]
    assert strategy.parameters() == sum(parameters[:-1]), "beside the model itself"


def test_separate_trains_on_its_own_experience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fits(monkeypatch)
    of = run(tmp_path, {"strategy": "separate"})
    assert fits.rows == [rows_of(of, range(e, e + 1)) for e in range(5)]


def test_evaluating_separate_networks_draws_no_random_numbers(tmp_path: Path) -> None:
    of = run(tmp_path, {"strategy": "separate", "stream": {"limit": 2}}, HEADS["growing"])
    (strategy,) = of.strategies
    before = torch.get_rng_state()
    assert strategy.predict(torch.rand(2, 1, 8, 8), 0) is not None
    assert strategy.predict(torch.rand(2, 1, 8, 8), None) is None
    torch.rand(32)  # what the two calls above drew themselves
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    x = torch.ones(2, 1, 8, 8)
    strategy.predict(x, 1)
    strategy.predict(x, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("both", [["joint", "cumulative"], ["cumulative", "joint"]])
def test_two_that_decide_on_the_data_are_refused(tmp_path: Path, both: list[str]) -> None:
    with pytest.raises(UserError, match="'joint'"):
        opened(tmp_path, {"strategy": both})
