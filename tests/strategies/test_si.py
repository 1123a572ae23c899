"""Synaptic intelligence against plain steps in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.strategies import SI

from .helpers import opened
from .stepping import DOMAIN, EXACT, enter, leave, take, the, walk

STRENGTH, DAMPING = 3.0, 0.02


def plain(of: Any, optimizer: dict[str, float], clip: float, whole: bool) -> tuple[Any, dict[str, Tensor]]:
    """Two experiences of six steps each, written out; the model and its importances."""
    model = copy.deepcopy(of.model)
    weights = dict(model.named_parameters())
    importance: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in weights.items()}
    anchor = {n: p.detach().clone() for n, p in weights.items()}
    for experience in range(2):
        rule = torch.optim.SGD(model.parameters(), **optimizer)
        start = {n: p.detach().clone() for n, p in weights.items()}
        path = {n: torch.zeros_like(p) for n, p in weights.items()}
        for number in range(6):
            batch = take(of, experience, number)
            task = F.cross_entropy(model(batch.x, of.context.route(experience)).logits, batch.y)
            unpenalised = torch.autograd.grad(task, list(weights.values()), retain_graph=True)
            terms = [(importance[n] * (p - anchor[n]) ** 2).sum() for n, p in weights.items()]
            rule.zero_grad()
            (task + STRENGTH * sum(terms)).backward()
            if clip:
                for p in weights.values():
                    assert p.grad is not None
                    p.grad.clamp_(-clip, clip)
            before = {n: p.detach().clone() for n, p in weights.items()}
            rule.step()
            for (n, p), g in zip(weights.items(), unpenalised, strict=True):
                if whole:
                    assert p.grad is not None
                    path[n] += optimizer["lr"] * p.grad**2
                else:
                    path[n] -= g * (p.detach() - before[n])
        for n, p in weights.items():
            grown = importance[n] + path[n] / ((p.detach() - start[n]) ** 2 + DAMPING)
            importance[n], anchor[n] = grown.clamp(min=0), p.detach().clone()
    return model, importance


@pytest.mark.parametrize(
    ("gradient", "optimizer", "clip"),
    [
        ("task", {"lr": 0.1}, 0.0),
        ("task", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, 0.0),
        ("task", {"lr": 0.1}, 0.01),
        ("whole", {"lr": 0.1}, 0.01),
    ],
)
def test_two_experiences_step_by_step(tmp_path: Path, gradient: str, optimizer: dict[str, float], clip: float) -> None:
    spec = {"name": "si", "strength": STRENGTH, "damping": DAMPING, "gradient": gradient}
    changes = {"strategy": spec, "optimizer": optimizer, "trainer": {"clip_value": clip}}
    of = opened(tmp_path, EXACT, DOMAIN, changes)
    enter(of, 0)
    model, importance = plain(of, optimizer, clip, gradient == "whole")
    walk(of, 0, range(6))
    leave(of, 0)
    enter(of, 1)
    walk(of, 1, range(6))
    leave(of, 1)
    found = the(of, SI)
    assert any(float(v.max()) > 1e-3 for v in importance.values())
    for name, p in of.model.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.importance[name], importance[name], rtol=1e-7, atol=1e-12)
        assert torch.equal(found.anchor[name], p)


def test_the_own_penalty_makes_no_path(tmp_path: Path) -> None:
    """Where the gradient of all losses is that of the own penalty alone, no path is made."""
    of = opened(tmp_path, EXACT, {"strategy": {"name": "si", "strength": 1e3}})
    enter(of, 0)
    walk(of, 0, range(3))
    leave(of, 0)
    enter(of, 1)
    found = the(of, SI)
    with torch.no_grad():
        for p in of.model.parameters():
            p.add_(0.1)
    batch = take(of, 1, 0)
    output = of.model(batch.x, of.context.route(1))
    of.model.zero_grad()
    found.losses(output, batch)["si"].backward()
    assert any(float(p.grad.abs().max()) > 0 for p in of.model.parameters() if p.grad is not None)
    found.edit_gradients()
    assert all(gradient is None or not gradient.any() for gradient, _ in found._step)


def test_a_fit_without_hooks_makes_no_path(tmp_path: Path) -> None:
    """The warm-up of another strategy moves weights before the path begins."""
    of = opened(tmp_path, EXACT, {"strategy": [{"name": "si"}, {"name": "lwf", "warm_up": True}]})
    enter(of, 0)
    leave(of, 0)
    of.begin(of.segments[1])
    for strategy in of.strategies:
        strategy.before_experience(of.segments[1])
    (_, warm_up), (_, training) = of.remaining_phases(of.segments[1])
    si = the(of, SI)
    si.before_phase(of.segments[1], warm_up)
    assert not si.start
    si.before_phase(of.segments[1], training)
    assert si.start.keys() == dict(of.model.named_parameters()).keys()
