"""Asymmetric cross-entropy against its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmoe.errors import UserError
from cmoe.learners import Batch
from cmoe.strategies import ERACE

from .helpers import opened
from .stepping import EACH, HEADS, second, take, the, two_experiences

SPEC = {"name": "er_ace", "batch": 6, "size": 40}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("outputs", ["all", "seen"])
def test_loss_is_its_formula(tmp_path: Path, head: str, outputs: str) -> None:
    of = second(tmp_path, {"strategy": SPEC, "model": {"train_outputs": outputs}}, HEADS[head])
    ace = the(of, ERACE)
    whole = take(of, 1, 6)
    # one of the experience's classes alone comes in, so that what is in the batch and what is met differ
    alone = whole.y == whole.y[0]
    assert 0 < int(alone.sum()) < len(alone)
    incoming = Batch(whole.x[alone], whole.y[alone], 1, whole.ids[alone], int(alone.sum()))
    batch = ace.extend_batch(incoming)
    assert len(batch.x) == len(incoming.x) + 6
    output = of.model(batch.x, of.context.route(batch.task))
    losses = ace.loss(output, batch)

    met = {c for e in (0, 1) for c in of.stream.experiences[e].classes}
    assert set(ace.met.nonzero().flatten().tolist()) == met
    assert isinstance(batch.task, torch.Tensor)
    terms: dict[str, list[float]] = {"task": [], "replay": []}
    for i, z in enumerate(output.logits.detach()):
        fresh = i < incoming.incoming
        kept = []
        for u, (c, t) in enumerate(of.model.head.units):
            if of.model.head.kind == "multi":
                if t != int(batch.task[i]):
                    continue
            elif outputs == "seen" and c not in of.context.seen:
                continue
            if (c == int(whole.y[0]) or c not in met) if fresh else c in met:
                kept.append(u)
        place = [of.model.head.units[u][0] for u in kept].index(int(batch.y[i]))
        terms["task" if fresh else "replay"].append(-float(z[kept].log_softmax(0)[place]))
    assert set(losses) == {"task", "replay"}
    for name, values in terms.items():
        assert float(losses[name].detach()) == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-12)
    assert sum(terms["replay"]) > 1e-3


def test_incoming_samples_leave_old_outputs_alone(tmp_path: Path) -> None:
    of = second(tmp_path, {"strategy": SPEC})
    batch = take(of, 1, 6)
    output = of.model(batch.x, of.context.route(1))
    (row,) = torch.autograd.grad(the(of, ERACE).loss(output, batch)["task"], output.logits)
    old = list(of.stream.experiences[0].classes)
    assert torch.equal(row[:, old], torch.zeros_like(row[:, old]))
    assert float(row.abs().sum()) > 0


def test_it_takes_the_place_of_the_tasks_loss(tmp_path: Path) -> None:
    """A step goes down the asymmetric loss and no other: one plain gradient step is found again by hand."""
    of = second(tmp_path, {"strategy": SPEC})
    ace, batch = the(of, ERACE), take(of, 1, 6)
    state = ace.buffer.generator.get_state()
    extended = ace.extend_batch(batch)
    ace.buffer.generator.set_state(state)
    parameters = list(of.model.parameters())
    losses = ace.loss(of.model(extended.x, of.context.route(extended.task)), extended)
    gradients = torch.autograd.grad(losses["task"] + losses["replay"], parameters)
    expected = [p.detach() - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
    of.learner.step(batch)
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("head", "precision"), EACH)
def test_two_experiences(tmp_path: Path, head: str, precision: str) -> None:
    of = two_experiences(tmp_path, {"strategy": SPEC}, HEADS[head], {"trainer": {"precision": precision}})
    assert int(the(of, ERACE).met.sum()) == 4


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.er_ace: expected model\.train_outputs 'all' or 'seen'.*'current'"):
        opened(tmp_path, {"strategy": SPEC, "model": {"train_outputs": "current"}})
