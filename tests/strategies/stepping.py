"""Single steps of a run on known samples, for comparing them with formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmoe.learners import Batch
from cmoe.session import Session
from cmoe.strategies import Strategy

from .helpers import LEARNED, begin, opened, run, same, weights

S = TypeVar("S", bound=Strategy)

EXACT: dict[str, Any] = {"trainer": {"precision": "64-true"}}
DOMAIN: dict[str, Any] = {"stream": {"scenario": "domain"}}
HEADS: dict[str, dict[str, Any]] = {
    "shared": {},
    "growing": {"model": {"head": "growing"}, "stream": {"class_order": "shuffled"}},
    "multi": {"stream": {"scenario": "task"}},
    "experts": {"model": {"moe": LEARNED, "head": "growing"}},
}
# every head and every precision at least once
EACH = [
    ("shared", "32-true"),
    ("growing", "64-true"),
    ("multi", "bf16-mixed"),
    ("shared", "bf16-true"),
    ("experts", "bf16-mixed"),
]


def the(of: Session, kind: type[S]) -> S:
    """The run's one strategy of a class."""
    (found,) = (s for s in of.strategies if isinstance(s, kind))
    return found


def take(of: Session, experience: int, number: int, count: int = 8) -> Batch:
    """Batch `number` of an experience's training samples, `count` each, in their order."""
    split = of.stream.experiences[experience].train
    ids = split.index[number * count : (number + 1) * count]
    assert len(ids) == count
    assert split.y is not None
    x = of.context.inputs(split.x[ids], torch.full((count,), experience), None)
    return Batch(x, split.y[ids], experience, ids, count)


def enter(of: Session, number: int) -> None:
    """The beginning of a segment's training."""
    begin(of, of.segments[number])
    of.learner.begin_phase(of.optimizer_options.build(of._trainable()), None, _own_loss(of, number))


def _own_loss(of: Session, number: int) -> Any:
    ((_, phase),) = of.remaining_phases(of.segments[number])
    return phase.loss


def walk(of: Session, experience: int, numbers: Iterable[int]) -> None:
    """Steps on an experience's batches."""
    for number in numbers:
        of.learner.step(take(of, experience, number))


def leave(of: Session, number: int) -> None:
    """The end of a segment's training."""
    for strategy in of.strategies:
        strategy.after_experience(of.segments[number])
    of.model.train()


def second(root: Path, *changes: Mapping[str, Any]) -> Session:
    """A run in its second experience, five steps after the beginning of each."""
    of = opened(root, EXACT, *changes)
    enter(of, 0)
    walk(of, 0, range(5))
    leave(of, 0)
    enter(of, 1)
    walk(of, 1, range(5))
    return of


def goes_on_the_same(root: Path, kind: type[Strategy], *changes: Mapping[str, Any]) -> None:
    """The steps after a state was saved are those after it was loaded by another run, bit for bit."""
    of = second(root, *changes)
    torch.save(the(of, kind).state_dict(), root / "strategy.pt")
    torch.save({"structure": of.model.structure(), "weights": weights(of)}, root / "model.pt")
    torch.manual_seed(3)
    walk(of, 1, range(5, 8))

    def again(load: bool) -> Session:
        other = opened(root, EXACT, *changes)
        for segment in other.segments[:2]:
            begin(other, segment)
        model = torch.load(root / "model.pt", weights_only=True)
        other.model.restore_structure(model["structure"])
        other.model.load_state_dict(model["weights"])
        if load:
            the(other, kind).load_state_dict(torch.load(root / "strategy.pt", weights_only=True))
        _, phase = next(other.remaining_phases(other.segments[1]))
        for strategy in other.strategies:
            strategy.before_phase(other.segments[1], phase)
        other.model.train()
        other.learner.begin_phase(other.optimizer_options.build(other._trainable()), None, _own_loss(other, 1))
        torch.manual_seed(3)
        walk(other, 1, range(5, 8))
        return other

    assert same(weights(of), weights(again(load=True)))
    assert not same(weights(of), weights(again(load=False))), "the strategy's state must count"


def two_experiences(root: Path, *changes: Mapping[str, Any]) -> Session:
    """A whole run over two experiences, which must end well and hold something."""
    of = run(root, {"trainer": {"max_steps": 6}}, *changes, {"stream": {"limit": 2}})
    assert of.folder.facts()["status"] == "FINISHED"
    assert all(v.isfinite().all() for v in weights(of).values())
    facts = {k: v for s in of.strategies for k, v in s.facts().items()}
    assert any(k.endswith("/bytes") and v > 0 for k, v in facts.items())
    return of


def gradients_of(of: Session, batch: Batch) -> Tensor:
    """The gradient of the mean cross-entropy of a batch over all outputs, as one vector; the model is left alone."""
    logits = of.model(batch.x, of.context.route(batch.task)).logits
    loss = -logits.log_softmax(1)[torch.arange(len(batch.y)), batch.y].mean()
    made = torch.autograd.grad(loss, list(of.model.parameters()))
    return torch.cat([g.flatten() for g in made])


def vector(of: Session) -> Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in of.model.parameters()])
