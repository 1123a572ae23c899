"""Dark experience replay against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.session import Session
from cmoe.strategies import DER

from .helpers import opened
from .stepping import EACH, EXACT, HEADS, enter, leave, take, the, two_experiences, walk

FIRST, SECOND = [0, 9, 30, 47], [2, 11, 33, 40, 46]


def watched(root: Path, head: str, **options: Any) -> tuple[Session, list[Tensor], list[tuple[int, int]]]:
    """A run after three steps in each of two experiences, and by place the logits of every sample before the step
    that met it, and its experience and class."""
    of = opened(root, EXACT, {"strategy": {"name": "der", "batch": 4, **options}}, HEADS[head])
    logits, whose = [], []
    for e in (0, 1):
        enter(of, e)
        for number in range(3):
            batch = take(of, e, number)
            logits += list(of.model(batch.x, of.context.route(e)).logits.detach())
            whose += [(e, int(c)) for c in batch.y]
            of.learner.step(batch)
        if e == 0:
            leave(of, 0)
    return of, logits, whose


def own(of: Session, experience: int, width: int) -> list[int]:
    """The outputs that count for a sample of an experience, of the first `width`."""
    tasks = [t for _, t in of.model.head.units][:width]
    return [u for u, t in enumerate(tasks) if of.model.head.kind != "multi" or t == experience]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_losses_are_their_formula(tmp_path: Path, head: str, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    of, logits, whose = watched(tmp_path, head, alpha=0.7, beta=beta, size=100)
    der = the(of, DER)
    assert len(der.buffer) == len(logits) == 48
    widths = {len(z) for z in logits}
    assert widths == ({2, 4} if head in ("growing", "experts") else {10})
    draws = iter([torch.tensor(FIRST), torch.tensor(SECOND)])
    monkeypatch.setattr(der.buffer, "pick", lambda count: next(draws))
    batch = take(of, 1, 3)
    losses = der.losses(of.model(batch.x, of.context.route(1)), batch)

    split = [of.stream.experiences[e].train for e in (0, 1)]

    def now(place: int) -> Tensor:
        e, row = whose[place][0], place % 24
        raw = split[e].x[split[e].index[row : row + 1]]
        return of.model(of.context.inputs(raw, torch.tensor([e]), None), of.context.route(e)).logits[0].detach()

    squares = []
    for place in FIRST:
        z = now(place)
        squares += [float((z[u] - logits[place][u]) ** 2) for u in own(of, whose[place][0], len(logits[place]))]
    assert float(losses["der"].detach()) == pytest.approx(0.7 * sum(squares) / len(squares), rel=1e-9)
    assert losses["der"].requires_grad
    assert sum(squares) > 1e-4
    if not beta:
        assert set(losses) == {"der"}
        return
    terms = []
    for place in SECOND:
        e, c = whose[place]
        among = own(of, e, 1000)
        z = now(place)[among]
        classes = [of.model.head.units[u][0] for u in among]
        terms.append(-float(z.log_softmax(0)[classes.index(c)]))
    assert float(losses["replay"].detach()) == pytest.approx(0.3 * sum(terms) / len(terms), rel=1e-9)


def test_a_full_buffer_keeps_logits_with_their_samples(tmp_path: Path) -> None:
    of, logits, _ = watched(tmp_path, "growing", size=10)
    der = the(of, DER)
    buffer = der.buffer
    assert buffer.extra["logits"].shape == (10, 4)
    splits = [of.stream.experiences[e].train for e in (0, 1)]
    raw = torch.cat([s.x[s.index[:24]] for s in splits])
    met = set()
    for place in range(10):
        (row,) = [i for i in range(48) if torch.equal(raw[i], buffer.x[place])]
        width = int(buffer.extra["outputs"][place])
        assert width == len(logits[row])
        torch.testing.assert_close(buffer.extra["logits"][place, :width], logits[row], rtol=1e-12, atol=1e-12)
        met.add(width)
    assert met == {2, 4}


def test_nothing_is_added_before_anything_is_held(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, {"strategy": "der"})
    enter(of, 0)
    batch = take(of, 0, 0)
    assert the(of, DER).losses(of.model(batch.x, of.context.route(0)), batch) == {}


def test_old_classes_without_outputs_in_the_loss_count_for_nothing(tmp_path: Path) -> None:
    """A replayed batch may be all old under `train_outputs: current`: no division by zero."""
    current = {"model": {"train_outputs": "current"}}
    two_experiences(tmp_path, {"strategy": {"name": "der", "beta": 1.0, "batch": 1, "size": 5}}, current)


@pytest.mark.parametrize(("head", "precision"), EACH)
def test_two_experiences(tmp_path: Path, head: str, precision: str) -> None:
    spec = {"name": "der", "beta": 0.5, "batch": 4, "size": 30}
    of = two_experiences(tmp_path, {"strategy": spec}, HEADS[head], {"trainer": {"precision": precision}})
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert the(of, DER).buffer.extra["logits"].dtype == wanted


def test_it_forgets_less_than_naive(tmp_path: Path) -> None:
    def first(spec: Any, name: str) -> float:
        of = opened(tmp_path / name, EXACT, {"strategy": spec})
        for e in (0, 1):
            enter(of, e)
            walk(of, e, [*range(15), *range(15)])
            leave(of, e)
        test = of.stream.experiences[0].test
        assert test.y is not None
        x = of.context.inputs(test.raw(), torch.zeros(len(test), dtype=torch.int64), None)
        right = of.model(x, of.context.route(0)).logits.argmax(1) == test.targets()
        return float(right.double().mean())

    assert first({"name": "der", "alpha": 1.0, "beta": 1.0}, "der") > first("naive", "naive") + 0.2
