"""From planned experiences to a layout and its Avalanche benchmark: the last step of every builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmoe.errors import UserError, nearest
from cmoe.streams.arrays import labels, storage
from cmoe.streams.seeding import generator
from cmoe.streams.stream import Experience, Layout, Split
from cmoe.streams.task import Modality, Task
from cmoe.streams.transforms import BatchTransform, Scale, Tokens
from cmoe.streams.view import avalanche_benchmark

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

Arrays = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """One experience before the scenario has its say.

    Attributes:
        name, classes, train, validation, test: as in `Experience`.
        labelled: whether the task label is given.
    """

    name: str
    classes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    labelled: bool


def check_scenario(task: Task) -> None:
    """Refuse a scenario that the task does not have.

    Raises:
        UserError: names those it has.
    """
    known = type(task).scenarios
    if task.scenario not in known:
        near = nearest(task.scenario, known)
        raise UserError(f"stream.scenario: expected one of {', '.join(known)}, got '{task.scenario}'{near}")


def pairs(train: Arrays, test: Arrays, modality: Modality) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, test x and test y as storages and labels.

    Raises:
        UserError: empty, or train and test samples differ in shape or type.
    """
    x, x_test = storage(train[0], modality, "training samples"), storage(test[0], modality, "test samples")
    y, y_test = labels(train[1], x.shape[0], "training labels"), labels(test[1], x_test.shape[0], "test labels")
    for what, values in (("training", x), ("test", x_test)):
        if not values.shape[0]:
            raise UserError(f"{what} samples: expected at least one, got none")
    same_form(x, x_test, "test samples")
    return x, y, x_test, y_test


def same_form(x: Tensor, other: Tensor, what: str) -> None:
    """Refuse samples of another shape or type than the training samples'.

    Raises:
        UserError: says both.
    """
    if x.shape[1:] != other.shape[1:] or x.dtype != other.dtype:
        raise UserError(
            f"{what}: expected shape {tuple(x.shape[1:])} and {x.dtype} as the training samples, "
            f"got {tuple(other.shape[1:])} and {other.dtype}"
        )


def default_transform(task: Task, modality: Modality) -> BatchTransform:
    """The task's own transform, else tokens as they are and bytes divided by 255."""
    return task.transform() or (Tokens() if modality in ("text", "bytes") else Scale())


def segments_of(task: Task, count: int) -> list[tuple[int, ...]]:
    """Which experiences are trained together."""
    return [tuple(range(count))] if task.scenario == "joint" else [(i,) for i in range(count)]


def part_sizes(samples: int, size: int) -> tuple[int, ...]:
    """How many samples each small experience of the online scenario has; the last may have fewer."""
    full, rest = divmod(samples, size)
    return (size,) * full + ((rest,) if rest else ())


def arrival(rows: Tensor, seed: int, experience: int) -> Tensor:
    """The order in which the rows of an experience arrive in the online scenario."""
    return rows.index_select(0, torch.randperm(len(rows), generator=generator("online", seed, experience)))


def finish(
    task: Task,
    seed: int,
    plans: Sequence[Plan],
    modality: Modality,
    class_names: Sequence[str] = (),
    transform: BatchTransform | None = None,
    vocabulary: int | None = None,
) -> CLScenario:
    """The benchmark of these experiences, its layout attached.

    Raises:
        UserError: an experience without training or test samples.
    """
    experiences = []
    for i, plan in enumerate(plans):
        for what in ("train", "test"):
            if not len(getattr(plan, what)):
                raise UserError(f"experience {i} ({plan.name}): no {what} samples")
        train, parts = plan.train, None
        if task.scenario == "online":
            train = Split(train.x, arrival(train.index, seed, i), train.y)
            parts = part_sizes(len(train), task.online_size)
        label = i if plan.labelled else 0
        experiences.append(Experience(i, plan.name, label, plan.classes, train, plan.validation, plan.test, parts))
    layout = Layout(
        modality=modality,
        scenario=task.scenario,
        experiences=experiences,
        segments=segments_of(task, len(experiences)),
        transform=transform or default_transform(task, modality),
        class_names=tuple(class_names),
        vocabulary=vocabulary,
    )
    return avalanche_benchmark(layout, task.online_size)
