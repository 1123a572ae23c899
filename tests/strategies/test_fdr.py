"""Function distance regularisation against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.strategies import FDR

from .helpers import opened
from .stepping import EXACT, HEADS, enter, leave, take, the, walk

SPEC: dict[str, Any] = {"name": "fdr", "batch": 5, "size": 40}


@pytest.mark.parametrize("head", HEADS)
def test_loss_is_its_formula(tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = opened(tmp_path, EXACT, {"strategy": {**SPEC, "alpha": 0.7}}, HEADS[head])
    fdr = the(of, FDR)
    ends: list[dict[int, list[float]]] = []
    for e in (0, 1):
        enter(of, e)
        walk(of, e, range(5))
        leave(of, e)
        # the network's answers at the experience's end, by sample of the storage, one at a time
        of.model.eval()
        split = of.stream.experiences[e].train
        answers = {}
        for row in split.index.tolist():
            x = of.context.inputs(split.x[row : row + 1], torch.tensor([e]), None)
            answers[row] = of.model(x, of.context.route(e)).logits[0].tolist()
        ends.append(answers)
        of.model.train()
    enter(of, 2)
    walk(of, 2, range(2))
    assert fdr.held["experience"].tolist() == [0] * 20 + [1] * 20
    rows = torch.tensor([0, 3, 19, 20, 39])
    monkeypatch.setattr(fdr, "random", lambda count: rows)
    batch = take(of, 2, 2)
    losses = fdr.losses(of.model(batch.x, of.context.route(2)), batch)
    storage, distances, widths = of.stream.experiences[0].train.x, [], set()
    for row in rows.tolist():
        e = int(fdr.held["experience"][row])
        sample = next(i for i in ends[e] if torch.equal(storage[i], fdr.held["x"][row]))
        then = torch.tensor(ends[e][sample], dtype=torch.float64)
        x = of.context.inputs(storage[sample : sample + 1], torch.tensor([e]), None)
        now = of.model(x, of.context.route(e)).logits[0].detach()
        tasks = [t for _, t in of.model.head.units][: len(then)]
        among = [u for u, t in enumerate(tasks) if head != "multi" or t == e]
        difference = now[among].softmax(0) - then[among].softmax(0)
        distances.append(sum(float(d) ** 2 for d in difference) ** 0.5)
        widths.add(len(then))
    assert widths == ({2, 4} if head in ("growing", "experts") else {10})
    assert max(distances) > 1e-3
    assert float(losses["fdr"].detach()) == pytest.approx(0.7 * sum(distances) / 5, rel=1e-9)
    assert losses["fdr"].requires_grad


def test_shares_shrink_as_experiences_come(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, {"strategy": SPEC})
    fdr, kept = the(of, FDR), []
    for e in range(3):
        enter(of, e)
        leave(of, e)
        counts = fdr.held["experience"].bincount().tolist()
        assert counts == [40 // (e + 1)] * (e + 1)
        kept.append(fdr.held["x"][: counts[0]])
    assert torch.equal(kept[2], kept[0][:13])


def test_equal_answers_have_a_gradient_of_zero(tmp_path: Path) -> None:
    """A norm has no slope at 0, where every experience begins."""
    of = opened(tmp_path, EXACT, {"strategy": SPEC})
    enter(of, 0)
    leave(of, 0)
    enter(of, 1)
    batch = take(of, 1, 0)
    fdr = the(of, FDR)
    loss = fdr.losses(of.model(batch.x, of.context.route(1)), batch)["fdr"]
    gradients = torch.autograd.grad(loss, list(of.model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert float(loss.detach()) < 1e-12
