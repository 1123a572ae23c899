"""The task's loss against its definition, sample by sample in float64."""

from __future__ import annotations

import math

import pytest
import torch

from cmoe.learners import Batch, Head
from cmoe.learners.objective import PADDING, Classification, Language

from .helpers import batch

ORDER = [[7, 2], [5, 0], [3, 1]]  # not contiguous, not sorted
SEEN, CURRENT = [7, 2, 5, 0], [5, 0]


def head(kind: str) -> Head:
    made = Head(6, kind)
    if kind == "shared":
        made.add(range(8))
    for task, classes in enumerate(ORDER):
        if kind == "multi":
            made.add(classes, task)
        elif kind == "growing" and task < 2:
            made.add(classes)
    return made


def allowed(kind: str, train_outputs: str, units: list[tuple[int, int]], task: int) -> list[int]:
    """Outputs that a sample of this task competes among."""
    if kind == "multi":
        return [u for u, (_, t) in enumerate(units) if t == task]
    classes = {"all": range(10), "seen": SEEN, "current": CURRENT}[train_outputs]
    return [u for u, (c, _) in enumerate(units) if c in classes]


def naive(
    kind: str, train_outputs: str, made: Head, logits: list[list[float]], y: list[int], tasks: list[int]
) -> float:
    total, count = 0.0, 0
    for row, label, task in zip(logits, y, tasks, strict=True):
        among = allowed(kind, train_outputs, made.units, task)
        own = [u for u in among if made.units[u][0] == label]
        if not own:  # an old class under 'current'
            continue
        total += math.log(sum(math.exp(row[u]) for u in among)) - row[own[0]]
        count += 1
    return total / count


BATCHES = {
    "one task": ([5, 0, 0, 5], 1),
    "one label each": ([5, 0, 5], [1, 1, 1]),
    "mixed": ([5, 7, 0, 2, 2, 5], [1, 0, 1, 0, 0, 1]),
}


@pytest.mark.parametrize("kind", ["shared", "growing", "multi"])
@pytest.mark.parametrize("train_outputs", ["all", "seen", "current"])
@pytest.mark.parametrize("which", BATCHES)
def test_loss_is_its_definition(kind: str, train_outputs: str, which: str) -> None:
    made, (y, task) = head(kind), BATCHES[which]
    objective = Classification(made, train_outputs)
    objective.begin(SEEN, CURRENT)
    logits = torch.randn(len(y), len(made), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    tasks = [task] * len(y) if isinstance(task, int) else task
    expected = naive(kind, train_outputs, made, logits.tolist(), y, tasks)
    assert float(objective.loss(logits, batch(y, task))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["shared", "growing", "multi"])
@pytest.mark.parametrize("train_outputs", ["all", "seen", "current"])
def test_only_allowed_outputs_learn(kind: str, train_outputs: str) -> None:
    made = head(kind)
    objective = Classification(made, train_outputs)
    objective.begin(SEEN, CURRENT)
    logits = torch.zeros(4, len(made), requires_grad=True)
    objective.loss(logits, batch([5, 0, 0, 5], 1)).backward()
    assert logits.grad is not None
    learns = logits.grad.abs().sum(0).nonzero().flatten().tolist()
    assert learns == allowed(kind, train_outputs, made.units, 1)


@pytest.mark.parametrize("kind", ["shared", "growing"])
def test_a_batch_of_old_classes_alone_teaches_nothing(kind: str) -> None:
    made = head(kind)
    objective = Classification(made, "current")
    objective.begin(SEEN, CURRENT)
    logits = torch.randn(3, len(made), requires_grad=True)
    loss = objective.loss(logits, batch([7, 2, 7], 0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_new_segment_begins_anew() -> None:
    made = head("shared")
    objective, logits = Classification(made, "current"), torch.randn(2, 8)
    losses = []
    for current in ([7, 2], [5, 0], [7, 2]):
        objective.begin([7, 2, 5, 0], current)
        losses.append(float(objective.loss(logits, batch(current, 0))))
    assert losses[0] == losses[2] != losses[1]


def test_identity_head_sees_logits_as_they_are() -> None:
    made = Head(6, "shared")
    made.add(range(4))
    objective = Classification(made, "all")
    objective.begin([0], [0])
    logits, drawn = torch.randn(3, 4), batch([3, 0, 2], 0)
    assert objective.select(logits, drawn) == (logits, drawn.y)


@pytest.mark.parametrize("task", [0, 1, [1, 0, 1]])
@pytest.mark.parametrize("blocks", [1, 2])
def test_language_loss_is_the_mean_over_bytes(blocks: int, task: int | list[int]) -> None:
    made = Head(6, "multi")
    for t in range(blocks):
        made.add(range(256), t)
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 256, (3, 5), generator=generator)
    y[0, 3:] = PADDING
    logits = torch.randn(3, 5, 256 * blocks, dtype=torch.float64, generator=generator)
    tasks = [task] * 3 if isinstance(task, int) else task
    if blocks == 1:
        tasks = [0] * 3
    label = task if isinstance(task, int) else torch.tensor(task)
    if blocks == 1 and isinstance(label, int):
        label = 0
    nll = [
        -torch.log_softmax(logits[i, j, 256 * tasks[i] : 256 * tasks[i] + 256], 0)[y[i, j]].item()
        for i in range(3)
        for j in range(5)
        if y[i, j] != PADDING
    ]
    drawn = Batch(y, y, label, torch.arange(3), 3)
    assert float(Language(made).loss(logits, drawn)) == pytest.approx(sum(nll) / len(nll), rel=1e-12)
    assert len(nll) == 13
