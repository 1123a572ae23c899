"""The step against a loop written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.learners import Batch, Learner, Model, Output, StepHooks
from cmoe.learners.hooks import Forward
from cmoe.learners.objective import Classification
from cmoe.learners.optimizers import SGD, Adam, AdamW
from cmoe.learners.schedulers import Constant, Cosine, LinearWarmup, Step
from cmoe.moe import RouteContext
from cmoe.streams.scheduler import Chunk

from .helpers import batch, model

CLASSES = [([0, 1, 2], -1)]


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [batch(torch.randint(0, 3, (5,), generator=generator).tolist(), 0, seed) for seed in range(count)]


def learner(hooks: Sequence[StepHooks] = (), made: Model | None = None, **options: Any) -> Learner:
    made = made or model("shared", CLASSES)
    objective = Classification(made.head, "all")
    objective.begin([0, 1, 2], [0, 1, 2])
    return Learner(made, objective, hooks, **options)


def weights(of: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in of.model.parameters()]


OPTIMIZERS = {
    "sgd": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(lr=0.01, beta1=0.8, weight_decay=0.1),
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
}
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.999), weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_value": 0.01}])
@pytest.mark.parametrize("schedule", [None, Cosine(warmup=3)])
def test_steps_equal_a_handwritten_loop_bit_for_bit(optimizer: str, clip: dict, schedule: Cosine | None) -> None:
    ours, theirs = learner(**clip), model("shared", CLASSES)
    rates = None if schedule is None else lambda step: schedule.factor(step, 20)
    ours.begin_phase(OPTIMIZERS[optimizer].build(ours.model.parameters()), rates)
    native = TORCH[optimizer](theirs.parameters())
    base = native.param_groups[0]["lr"]
    for step, drawn in enumerate(batches(20)):
        output = ours.step(drawn)
        if schedule is not None:
            native.param_groups[0]["lr"] = base * schedule.factor(step, 20)
        logits = theirs(drawn.x, RouteContext()).logits
        assert torch.equal(output.logits, logits)
        native.zero_grad()
        F.cross_entropy(logits, drawn.y).backward()
        if "clip_norm" in clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip["clip_norm"])
        if "clip_value" in clip:
            torch.nn.utils.clip_grad_value_(theirs.parameters(), clip["clip_value"])
        native.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.parameters(), strict=True))
    assert (ours.steps, ours.phase_steps) == (20, 20)


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        (Constant(), [1.0] * 8),
        (LinearWarmup(warmup=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (Step(), [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (Step(milestones=(0.25,), gamma=0.5), [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (Cosine(), [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        (Cosine(warmup=2, floor=0.2), [0.5, 1, *(0.2 + 0.4 * (1 + math.cos(math.pi * i / 6)) for i in range(6))]),
    ],
)
def test_schedules(scheduler: Any, factors: list[float]) -> None:
    assert [scheduler.factor(step, 8) for step in range(8)] == pytest.approx(factors)
    made = learner()
    optimizer = SGD(lr=0.4).build(made.model.parameters())
    made.begin_phase(optimizer, lambda step: scheduler.factor(step, 8))
    seen = []
    for drawn in batches(8):
        made.step(drawn)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.4 * f for f in factors])


def test_clipping_counts_only_what_the_phase_trains() -> None:
    """A phase may train a part: gradients of the rest pile up unused and must not shrink the part's own."""
    whole, part = learner(clip_norm=0.05), model("shared", CLASSES)
    head = list(whole.model.head.parameters())
    whole.begin_phase(SGD(lr=0.1).build(head), None)
    part.backbone.requires_grad_(False)
    native = torch.optim.SGD(part.head.parameters(), lr=0.1)
    for drawn in batches(10):
        whole.step(drawn)
        native.zero_grad()
        F.cross_entropy(part(drawn.x, RouteContext()).logits, drawn.y).backward()
        torch.nn.utils.clip_grad_norm_(part.head.parameters(), 0.05)
        native.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), part.parameters(), strict=True))


class Spy(StepHooks):
    """Does something at every point and writes down when."""

    def __init__(self, name: str, log: list[str], model: Model) -> None:
        self.name, self.log, self.model = name, log, model

    def extend_batch(self, batch: Batch) -> Batch:
        self.log.append(f"extend {self.name}")
        return batch.extended(batch.x[:1], batch.y[:1], torch.tensor([7]))

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        self.log.append(f"losses {self.name} {len(output.logits)} {batch.incoming}")
        return {self.name: output.logits.square().mean()}

    def edit_gradients(self) -> None:
        self.log.append(f"edit {self.name}")
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.mul_(2.0)

    def after_step(self, batch: Batch, output: Output) -> None:
        self.log.append(f"after {self.name} {len(batch.x)}")


def test_hooks_act_in_list_order_and_add_up() -> None:
    log: list[str] = []
    made, theirs = model("shared", CLASSES), model("shared", CLASSES)
    ours = learner([Spy("a", log, made), Spy("b", log, made)], made)
    ours.begin_phase(SGD(lr=0.1).build(made.parameters()), None)
    drawn = batches(1)[0]
    ours.step(drawn)
    assert log == ["extend a", "extend b", "losses a 7 5", "losses b 7 5", "edit a", "edit b", "after a 7", "after b 7"]
    x, y = torch.cat((drawn.x, drawn.x[:1], drawn.x[:1])), torch.cat((drawn.y, drawn.y[:1], drawn.y[:1]))
    logits = theirs(x, RouteContext()).logits
    (F.cross_entropy(logits, y) + 2 * logits.square().mean()).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            assert p.grad is not None
            p -= 0.1 * 4 * p.grad
    for a, b in zip(made.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_phase_may_leave_hooks_out_and_have_its_own_loss() -> None:
    log: list[str] = []
    made = model("shared", CLASSES)
    ours = learner([Spy("a", log, made)], made)
    ours.begin_phase(
        SGD().build(made.parameters()), None, lambda output, batch: {"own": 0 * output.logits.sum()}, False
    )
    before = weights(ours)
    ours.step(batches(1)[0])
    assert log == []
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))


class Twice(StepHooks):
    """The gradient of twice the losses, from two passes."""

    owns_gradients = True

    def gradients(self, batch: Batch, forward: Forward) -> tuple[Output, dict[str, Tensor]]:
        for _ in range(2):
            output, losses = forward(batch)
            sum(losses.values(), torch.zeros(())).backward()
        return output, losses


def test_a_strategy_may_have_its_own_rule_for_gradients() -> None:
    once, twice = model("shared", CLASSES), model("shared", CLASSES)
    for made, hooks, lr in ((once, [], 0.2), (twice, [Twice()], 0.1)):
        ours = learner(hooks, made)
        ours.begin_phase(SGD(lr=lr).build(made.parameters()), None)
        ours.step(batches(1)[0])
    for a, b in zip(weights(learner(made=once)), weights(learner(made=twice)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_phase_may_train_something_else() -> None:
    made, other = model("shared", CLASSES), torch.nn.Linear(3, 1)
    log: list[str] = []
    ours = learner([Spy("a", log, made)], made)
    before = weights(ours)
    ours.begin_phase(
        SGD(lr=0.1).build(other.parameters()), None, objective=lambda batch: {"own": (other.bias - 1).square().sum()}
    )
    start = other.bias.item()
    assert ours.step(batches(1)[0]) is None
    assert other.bias.item() == pytest.approx(start + 0.2 * (1 - start))
    assert log == []
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))


class Named(StepHooks):
    """A loss under a name that another may have."""

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        return {"twin": output.logits.square().mean()}


def test_losses_of_one_name_all_count() -> None:
    once, twice = model("shared", CLASSES), model("shared", CLASSES)
    told: dict[str, float] = {}
    for made, hooks in ((once, [Named()]), (twice, [Named(), Named()])):
        ours = learner(hooks, made, log=lambda values, step: told.update(values), log_every=1)
        ours.begin_phase(SGD(lr=0.0).build(made.parameters()), None)
        ours.step(batches(1)[0])
        if made is once:
            single = told["train/loss_twin"]
    assert told["train/loss_twin"] == pytest.approx(2 * single)


class Broken(StepHooks):
    """Makes the loss what it is told, from a step on."""

    def __init__(self, value: float, step: int) -> None:
        self.value, self.left = value, step

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        self.left -= 1
        return {"broken": output.logits.sum() * 0 + self.value} if self.left < 0 else {}


def chunk(drawn: list[Batch]) -> Chunk:
    flat = tuple(torch.cat([getattr(b, name) for b in drawn]) for name in ("x", "y", "ids"))
    x, y, ids = flat
    return Chunk.cut((x, y, torch.zeros_like(y), ids), tuple(len(b.x) for b in drawn), 0, 0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("log_every", [0, 1, 50])
def test_a_loss_that_is_no_number_ends_the_run(value: float, log_every: int) -> None:
    """However seldom the curve is logged: a run must not end well with weights that are no numbers."""
    ours = learner([Broken(value, 6)], log_every=log_every)
    ours.begin_phase(SGD().build(ours.model.parameters()), None)
    ours.training_step(chunk(batches(6)), 0)
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step"):
        ours.training_step(chunk(batches(6)), 1)


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6])])
def test_log_every(every: int, steps: list[int]) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    made = model("shared", CLASSES)
    ours = learner([Spy("more", [], made)], made, log=lambda v, s: logged.append((v, s)), log_every=every)
    for part in (batches(7)[:4], batches(7)[4:]):  # a new phase goes on counting
        ours.begin_phase(SGD(lr=0.01).build(made.parameters()), None)
        ours.training_step(chunk(part), 0)
    assert [step for _, step in logged] == steps
    for values, _ in logged:
        assert set(values) == {"train/loss", "train/loss_task", "train/loss_more"}
        assert values["train/loss"] == pytest.approx(values["train/loss_task"] + values["train/loss_more"])


def test_a_chunk_is_its_batches_one_by_one() -> None:
    chunked, stepped = learner(), learner()
    for made in (chunked, stepped):
        made.begin_phase(SGD(lr=0.1, momentum=0.5).build(made.model.parameters()), None)
    chunked.training_step(chunk(batches(6)), 0)
    for drawn in batches(6):
        stepped.step(drawn)
    assert all(torch.equal(a, b) for a, b in zip(weights(chunked), weights(stepped), strict=True))
