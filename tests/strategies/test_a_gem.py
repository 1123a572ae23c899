"""The projection of A-GEM against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.learners import Batch
from cmoe.session import Session
from cmoe.strategies import AGEM

from .helpers import opened
from .stepping import (
    EXACT,
    enter,
    gradients_of,
    leave,
    take,
    the,
    vector,
    walk,
)

SPEC = {"name": "a_gem", "batch": 6, "size": 50}
ROWS = torch.tensor([1, 4, 9])


def at_second(root: Path, **changes: Any) -> Session:
    """A run at the beginning of its second experience."""
    of = opened(root, EXACT, {"strategy": SPEC, **changes})
    enter(of, 0)
    walk(of, 0, range(10))
    leave(of, 0)
    enter(of, 1)
    return of


def remembered(of: Session, rows: torch.Tensor) -> Batch:
    held = the(of, AGEM).held
    x = of.context.inputs(held["x"][rows], held["experience"][rows], None)
    return Batch(x, held["y"][rows], 0, rows, len(rows))


@pytest.mark.parametrize("experience", [0, 1])
def test_a_step_is_its_formula(tmp_path: Path, experience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New classes conflict with old ones and are projected; old samples agree and pass unchanged."""
    of = at_second(tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(the(of, AGEM), "random", lambda count: asked.append(count) or ROWS)
    batch = take(of, experience, 0)
    g, r = gradients_of(of, batch), gradients_of(of, remembered(of, ROWS))
    product = sum(float(a) * float(b) for a, b in zip(g, r, strict=True))
    assert (product < -1e-6) is (experience == 1)
    expected = g - product / sum(float(a) ** 2 for a in r) * r if product < 0 else g
    before = vector(of)
    of.learner.step(batch)
    assert asked == [6]
    torch.testing.assert_close((before - vector(of)) / 0.1, expected, rtol=1e-8, atol=1e-10)
    if product < 0:
        assert abs(float(expected @ r)) < 1e-9


def test_each_experience_leaves_its_share(tmp_path: Path) -> None:
    of = at_second(tmp_path)
    walk(of, 1, range(2))
    leave(of, 1)
    held = the(of, AGEM).held
    assert held["experience"].tolist() == [0] * 10 + [1] * 10  # 50 samples for 5 experiences
    for e in (0, 1):
        split = of.stream.experiences[e].train
        rows = held["experience"] == e
        raw, targets = split.raw(), split.targets()
        assert targets is not None
        places = [[i for i in range(len(raw)) if torch.equal(raw[i], x)] for x in held["x"][rows]]
        assert all(places)
        assert [int(targets[p[0]]) for p in places] == held["y"][rows].tolist()
        assert len({p[0] for p in places}) == 10
        assert {p[0] for p in places} != set(range(10)), "drawn at random"


def test_nothing_changes_in_the_first_experience(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, {"strategy": SPEC})
    enter(of, 0)
    batch = take(of, 0, 0)
    g, before = gradients_of(of, batch), vector(of)
    of.learner.step(batch)
    torch.testing.assert_close((before - vector(of)) / 0.1, g, rtol=1e-8, atol=1e-10)
