"""Hard attention to the task: its gates, its loss and its rules for gradients against plain formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners import Batch
from cmoe.moe import RouteContext
from cmoe.session import Session
from cmoe.strategies import HAT

from .helpers import LEARNED, WORLDS, begin, opened, run, weights
from .stepping import EXACT, leave, take, the
from .whole import ends_the_same, predicts_the_same

TASK: dict[str, Any] = {"stream": {"scenario": "task", "limit": 3}, "model": {"hidden": [20, 10]}}
SHORT = {"trainer": {"max_steps": 6}}
S_MAX = 50.0
SPEC: dict[str, Any] = {"strategy": {"name": "hat", "s_max": S_MAX, "strength": 0.6}}


def enter(of: Session, number: int) -> None:
    """The beginning of a segment's training, embeddings included."""
    begin(of, of.segments[number])
    ((_, phase),) = of.remaining_phases(of.segments[number])
    assert phase.parameters is not None
    of.learner.begin_phase(of.optimizer_options.build(phase.parameters()), None)


def second(root: Path, *changes: dict[str, Any]) -> Session:
    """A run that is about to take its second experience's fourth step."""
    of = opened(root, EXACT, TASK, SPEC, SHORT, *changes)
    for number, steps in ((0, 6), (1, 3)):
        enter(of, number)
        for i in range(steps):
            of.learner.step(take(of, number, i))
        if number == 0:
            leave(of, 0)
    return of


def plain(
    of: Session, batch: Batch, task: int, s: float
) -> tuple[dict[str, Tensor], list[Tensor], Tensor, list[Tensor]]:
    """By the formulas: copies of weights, copies of embeddings, the logits and the gates of each layer."""
    copies = {n: p.detach().clone().requires_grad_() for n, p in of.model.named_parameters()}
    embeddings = [e.detach().clone().requires_grad_() for e in the(of, HAT).embedding(task)]
    h, gates = batch.x.flatten(1), [1 / (1 + torch.exp(-s * e)) for e in embeddings]
    for i, gate in enumerate(gates):
        h = (h @ copies[f"backbone.layers.{i}.weight"].T + copies[f"backbone.layers.{i}.bias"]).clamp(min=0) * gate
    heads = range(len(of.model.head.blocks))
    logits = torch.cat([h @ copies[f"head.blocks.{k}.weight"].T + copies[f"head.blocks.{k}.bias"] for k in heads], 1)
    return copies, embeddings, logits, gates


def test_one_step_is_its_formulas(tmp_path: Path) -> None:
    """Plain SGD from known weights: loss, protected weights, and embeddings with their compensated gradients."""
    of = second(tmp_path)
    hat = the(of, HAT)
    s = 1 / S_MAX + (S_MAX - 1 / S_MAX) * 3 / 5  # the fourth of six batches
    batch = take(of, 1, 3)
    copies, embeddings, logits, gates = plain(of, batch, 1, s)
    attended = [1 / (1 + torch.exp(-S_MAX * e.detach())) for e in hat.embedding(0)]
    own = [u for u, (_, t) in enumerate(of.model.head.units) if t == 1]
    classes = torch.tensor([of.model.head.units[u][0] for u in own])
    log_p = logits[:, own].log_softmax(1)
    entropy = -log_p[batch.y.unsqueeze(1) == classes].mean()
    free = sum((1 - a).sum() for a in attended)
    used = sum((g * (1 - a)).sum() for g, a in zip(gates, attended, strict=True))
    loss = entropy + 0.6 * used / free
    loss.backward()
    expected = {}
    for name, copy in copies.items():
        g = torch.zeros_like(copy) if copy.grad is None else copy.grad.clone()
        for i, a in enumerate(attended):
            if name == f"backbone.layers.{i}.bias":
                g = g * (1 - a)
            if name == f"backbone.layers.{i}.weight":
                for row in range(g.shape[0]):
                    for column in range(g.shape[1]):
                        before = float(attended[i - 1][column]) if i else 1.0
                        g[row, column] *= 1 - min(float(a[row]), before)
        expected[name] = copy.detach() - 0.1 * g
    moved = []
    for e in embeddings:
        assert e.grad is not None
        factor = [S_MAX * (math.cosh(s * v) + 1) / (s * (math.cosh(v) + 1)) if abs(s * v) <= 50 else
                  S_MAX * (math.cosh(50) + 1) / (s * (math.cosh(v) + 1)) for v in e.tolist()]  # fmt: skip
        moved.append((e.detach() - 0.1 * e.grad * torch.tensor(factor)).clamp(-6, 6))
    assert hat.scale == pytest.approx(s, rel=1e-12)
    of.learner.step(batch)
    for name, parameter in of.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-11)
    for found, formula, old in zip(hat.embedding(1), moved, embeddings, strict=True):
        torch.testing.assert_close(found.detach(), formula, rtol=1e-7, atol=1e-9)
        assert not torch.equal(formula, old.detach())
    assert any((a > 0.01).any() and (a < 0.99).any() for a in attended)


def test_steepness_rises_within_each_epoch(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, TASK, SPEC, {"trainer": {"batch_size": 50}})
    enter(of, 0)
    batches = math.ceil(len(of.stream.experiences[0].train) / 50)
    found = []
    for _ in range(2 * batches):
        found.append(the(of, HAT).scale)
        of.learner.step(take(of, 0, 0))
    once = [1 / S_MAX + (S_MAX - 1 / S_MAX) * b / (batches - 1) for b in range(batches)]
    assert batches > 3
    assert found == pytest.approx(once + once, rel=1e-12)


def test_evaluation_has_the_steepest_gates_and_mixed_batches_each_its_own(tmp_path: Path) -> None:
    of = second(tmp_path)
    batch, hat = take(of, 1, 3), the(of, HAT)
    for task in range(3):
        expected = plain(of, batch, task, S_MAX)[2].detach()
        torch.testing.assert_close(of.model(batch.x, of.context.route(task)).logits, expected, rtol=1e-9, atol=1e-9)
        found = hat.predict(batch.x, task)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert hat.predict(batch.x, None) is None
    mixed = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    for training in (True, False):
        logits = of.model(batch.x, RouteContext(task=mixed, training=training)).logits
        for row, task in enumerate(mixed.tolist()):
            s = hat.scale if training and task == 1 else S_MAX  # others are not trained now
            torch.testing.assert_close(logits[row], plain(of, batch, task, s)[2][row].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_what_is_wholly_attended_keeps_every_bit(tmp_path: Path, optimizer: str) -> None:
    """Gates of exactly 0 and 1: the old task's logits stay, under momentum and weight decay too."""
    options = {
        "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    }
    of = opened(tmp_path, TASK, SPEC, SHORT, {"optimizer": options[optimizer]})
    hat = the(of, HAT)
    enter(of, 0)
    of.learner.step(take(of, 0, 0))
    with torch.no_grad():
        for e in hat.embedding(0):
            e.copy_(torch.where(torch.arange(len(e)) % 2 == 0, 6.0, -6.0))
    leave(of, 0)
    assert all(set(a.tolist()) == {0.0, 1.0} or float(a.min()) < 1e-30 for a in hat.attended)
    x = take(of, 0, 1).x
    own = [u for u, (_, t) in enumerate(of.model.head.units) if t == 0]
    before, old = hat.predict(x, 0), weights(of)
    assert before is not None
    enter(of, 1)
    for i in range(6):
        of.learner.step(take(of, 1, i))
    after = hat.predict(x, 0)
    assert after is not None
    held = old["backbone.layers.0.weight"] == weights(of)["backbone.layers.0.weight"]
    assert held[::2].all()
    assert not held[1::2].all()
    # gates of 1e-130 are 0 in single precision
    assert torch.equal(before[:, own], after[:, own])
    assert not torch.equal(before, old["head.blocks.0.bias"])


def test_attention_is_the_largest_of_all_tasks(tmp_path: Path) -> None:
    of = second(tmp_path)
    leave(of, 1)
    hat = the(of, HAT)
    for i, attended in enumerate(hat.attended):
        each = [torch.sigmoid(S_MAX * hat.embedding(t)[i].detach()) for t in (0, 1)]
        torch.testing.assert_close(attended, torch.maximum(*each), rtol=1e-12, atol=0)
    facts = hat.facts()
    assert facts["hat/used"] == pytest.approx(float(torch.cat(hat.attended).mean()))
    assert facts["hat/bytes"] >= 8 * 3 * 30
    assert hat.parameters() == 30 * len(hat.embeddings)


@pytest.mark.parametrize(
    ("chunks", "optimizer"), [(1, {"name": "sgd"}), (4, {"name": "adam", "lr": 0.01, "reset": "never"})]
)
def test_a_stopped_run_ends_the_same(tmp_path: Path, chunks: int, optimizer: dict[str, Any]) -> None:
    """The optimizer's state of the embeddings and the place in the epoch are part of it."""
    more = {"trainer": {"chunk": 2, "epochs": 2, "batch_size": 64}, "optimizer": optimizer}
    state = ends_the_same(tmp_path, chunks, TASK, SPEC, more)
    assert len(state["strategies"][0]["attended"]) == 2


def test_predictions_and_exports_have_the_gates(tmp_path: Path) -> None:
    predicts_the_same(run(tmp_path, TASK, SHORT, SPEC), tmp_path / "export", labelled=True)


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "64-true"), ("adam", "bf16-true"), ("sgd", "bf16-mixed")])
def test_every_precision(tmp_path: Path, precision: str, optimizer: str) -> None:
    more = {"trainer": {"precision": precision}, "stream": {"limit": 2}, "optimizer": {"name": optimizer, "lr": 0.01}}
    of = run(tmp_path, TASK, SHORT, SPEC, more)
    assert of.folder.facts()["status"] == "FINISHED"
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert {e.dtype for e in the(of, HAT).embedding(0)} == {wanted}


@pytest.mark.parametrize("other", ["online_ewc", "si", "rwalk", "replay", "a_gem", "mir"])
def test_beside_others(tmp_path: Path, other: str) -> None:
    of = run(tmp_path, TASK, SHORT, {"strategy": [SPEC["strategy"], other]}, {"stream": {"limit": 2}})
    assert of.folder.facts()["status"] == "FINISHED"


def test_it_forgets_less_than_naive(tmp_path: Path) -> None:
    """As accuracy on the first task after the last."""

    def first(spec: Any) -> float:
        more = {"trainer": {"epochs": 4}, "model": {"hidden": [40, 40]}}
        of = run(tmp_path, TASK, {"strategy": spec}, more, {"stream": {"limit": 5}})
        column, targets = of.record.rows[4].columns[0], of.stream.experiences[0].test.targets()
        assert column.task_pred is not None
        assert targets is not None
        return float((column.task_pred == targets.numpy()).mean())

    assert first({"name": "hat", "s_max": 400.0}) >= max(0.9, first("naive") - 0.02)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": {"scenario": "class"}}, "a strategy that needs no task label in scenario 'class'"),
    ({"model": WORLDS["vit"]["model"]}, "strategy.hat: expected model.name 'mlp', on whose hidden units it puts gates, got 'vit'"),
    ({"model": {"moe": LEARNED}}, "strategy.hat: expected a model without experts"),
    ({"model": {"hidden": []}}, "strategy.hat: expected model.hidden with at least one layer"),
    ({"model": {"head": "growing"}}, "strategy.hat: expected model.head 'multi'"),
    ({"strategy": {"name": "hat", "s_max": 0.5}}, "strategy.hat.s_max: expected a number >= 1, got 0.5"),
    ({"strategy": ["hat", "cumulative"]}, "strategy.hat: expected no 'cumulative' beside it, hat's annealing"),
    ({"strategy": ["lwf", "hat"]}, "strategy.hat: expected no 'lwf' beside it, the other network"),
    ({"strategy": ["ncm", "hat"]}, "strategy.ncm: expected no 'hat' beside it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, TASK, SPEC, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
