"""The Riemannian walk against plain steps in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.strategies import RWalk

from .helpers import opened
from .stepping import DOMAIN, EXACT, enter, leave, take, the, walk

STRENGTH, ALPHA, INTERVAL, DAMPING = 2.0, 0.6, 3, 0.05
STEPS = 7  # no multiple of the interval


def plain(of: Any, optimizer: dict[str, float], normalise: bool) -> tuple[Any, dict[str, Tensor]]:
    """Two experiences written out, all weights as one vector; the model, and the last importances."""
    model = copy.deepcopy(of.model)
    parameters = list(model.parameters())

    def vector(parts: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in parts])

    size = len(vector(parameters))
    importance, anchor, fisher, scores = torch.zeros(size).double(), vector(parameters), None, None
    for experience in range(2):
        rule = torch.optim.SGD(parameters, **optimizer)
        score, lowered, origin = torch.zeros(size).double(), torch.zeros(size).double(), vector(parameters)
        for number in range(STEPS):
            batch = take(of, experience, number)
            task = F.cross_entropy(model(batch.x, of.context.route(experience)).logits, batch.y)
            g = vector(torch.autograd.grad(task, parameters, retain_graph=True))
            away = torch.cat([p.flatten() for p in parameters]) - anchor
            rule.zero_grad()
            (task + STRENGTH * (importance * away**2).sum()).backward()
            before = vector(parameters)
            rule.step()
            fisher = g**2 if fisher is None else ALPHA * g**2 + (1 - ALPHA) * fisher
            lowered += -g * (vector(parameters) - before)
            if (number + 1) % INTERVAL == 0 or number == STEPS - 1:
                score += lowered / (fisher * (vector(parameters) - origin) ** 2 / 2 + DAMPING)
                lowered, origin = torch.zeros(size).double(), vector(parameters)
        score = score.relu()
        scores = score if scores is None else (scores + score) / 2
        assert fisher is not None
        importance = fisher / fisher.max() + scores / scores.max() if normalise else fisher + scores
        anchor = vector(parameters)
    return model, importance


@pytest.mark.parametrize("optimizer", [{"lr": 0.1}, {"lr": 0.05, "momentum": 0.9}])
@pytest.mark.parametrize("normalise", [True, False])
def test_two_experiences_step_by_step(tmp_path: Path, optimizer: dict[str, float], normalise: bool) -> None:
    spec = {
        "name": "rwalk",
        "strength": STRENGTH,
        "alpha": ALPHA,
        "interval": INTERVAL,
        "damping": DAMPING,
        "normalise": normalise,
    }
    of = opened(tmp_path, EXACT, DOMAIN, {"strategy": spec, "optimizer": optimizer})
    enter(of, 0)
    model, importance = plain(of, optimizer, normalise)
    for e in range(2):
        if e:
            enter(of, e)
        walk(of, e, range(STEPS))
        leave(of, e)
    found = the(of, RWalk)
    assert float(importance.max()) > 1e-3
    for p, expected in zip(of.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)
    mine = torch.cat([found.importance[n].flatten() for n, _ in of.model.named_parameters()])
    torch.testing.assert_close(mine, importance, rtol=1e-7, atol=1e-12)
