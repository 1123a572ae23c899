"""Maximally interfered retrieval against its formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.errors import UserError
from cmoe.learners import Batch
from cmoe.learners.model import Model
from cmoe.session import Session
from cmoe.strategies import MIR

from .helpers import opened, same, weights
from .stepping import HEADS, second, take, the

SPEC: dict[str, Any] = {"name": "mir", "batch": 3, "candidates": 20, "size": 60}


def loss_of(of: Session, model: Model, batch: Batch, i: int) -> torch.Tensor:
    """Cross-entropy of one sample, over its own task's outputs in a multi-head."""
    task = int(batch.task[i]) if isinstance(batch.task, torch.Tensor) else batch.task
    z = model(batch.x[i : i + 1], of.context.route(task)).logits[0]
    among = [u for u, (_, t) in enumerate(model.head.units) if model.head.kind != "multi" or t == task]
    place = [model.head.units[u][0] for u in among].index(int(batch.y[i]))
    return -z[among].log_softmax(0)[place]


@pytest.mark.parametrize("head", HEADS)
def test_the_most_harmed_are_replayed(tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = second(tmp_path, {"strategy": {**SPEC, "lr": 0.5}}, HEADS[head])
    mir, batch = the(of, MIR), take(of, 1, 6)
    places = torch.arange(0, 60, 3)
    monkeypatch.setattr(mir.buffer, "pick", lambda count: places if count == 20 else pytest.fail("20 candidates"))
    x, y, task = mir.recalled(places)
    candidates = Batch(x, y, task, places, 0)
    trial = copy.deepcopy(of.model).eval()
    mean = torch.stack([loss_of(of, trial, batch, i) for i in range(8)]).mean()
    parameters = list(trial.parameters())
    before = [float(loss_of(of, trial, candidates, i).detach()) for i in range(20)]
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(mean, parameters, allow_unused=True), strict=True):
            if g is not None:
                p -= 0.5 * g
    after = [float(loss_of(of, trial, candidates, i).detach()) for i in range(20)]
    growth = [a - b for a, b in zip(after, before, strict=True)]
    assert max(growth) > 1e-3
    torch.testing.assert_close(
        mir.interference(batch, candidates), torch.tensor(growth, dtype=torch.float64), rtol=1e-8, atol=1e-10
    )
    most = sorted(range(20), key=lambda i: -growth[i])[:3]
    held = weights(of)
    extended = mir.extend_batch(batch)
    assert torch.equal(extended.x[8:], x[most])
    assert torch.equal(extended.y[8:], y[most])
    assert isinstance(extended.task, torch.Tensor)
    assert extended.task[8:].tolist() == task[most].tolist()
    assert same(held, weights(of)), "the trial leaves the weights as they are"
    assert all(module.training for module in of.model.modules())


def test_the_trial_takes_the_optimizers_rate(tmp_path: Path) -> None:
    assert the(opened(tmp_path, {"strategy": SPEC}), MIR).rate == 0.1


def test_too_few_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.mir\.candidates: expected at least 16, .*, got 3"):
        opened(tmp_path, {"strategy": {"name": "mir", "candidates": 3}})
