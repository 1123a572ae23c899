"""Class-incremental streams: experiences that each bring classes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.streams.arrays import grouped, hold_out, labels, named, ordering, storage
from cmoe.streams.assemble import Arrays, Plan, check_scenario, finish, pairs, same_form
from cmoe.streams.stream import Split, no_rows
from cmoe.streams.task import Modality, Task
from cmoe.streams.transforms import BatchTransform

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario


def class_incremental(
    task: Task,
    seed: int,
    *,
    train: Arrays,
    test: Arrays,
    experiences: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    validation: Arrays | None = None,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    transform: BatchTransform | None = None,
    modality: Modality | None = None,
    vocabulary: int | None = None,
) -> CLScenario:
    """Experiences that each bring classes of their own; every scenario.

    In the domain scenario the labels become the position of the class within its experience.

    Args:
        task: the plugin, for its options.
        seed: the run's.
        train, test: (x, y): (N, ...) samples and (N,) labels 0 .. n_classes-1.
        experiences: how many, of equally many classes; or give `groups`.
        groups: the classes of each experience; 'shuffled' then shuffles the groups, and an explicit class order is
            cut into pieces of their sizes.
        validation: official validation samples, used instead of a share of the training samples (unless
            `validation: 0` asks for none).
        class_names: one for each class.
        names: one for each group; default is made of the class names.
        transform: raw batch -> model input; default is `task.transform()`.
        modality: default is the task's.
        vocabulary: number of token ids, for text.

    Raises:
        UserError: options that this data cannot have, or arrays that do not fit together.
    """
    check_scenario(task)
    kind = modality or task.modality
    x, y, x_test, y_test = pairs(train, test, kind)
    fit = x.shape[0]
    if validation is not None:
        x_val = storage(validation[0], kind, "validation samples")
        same_form(x, x_val, "validation samples")
        y_val = labels(validation[1], x_val.shape[0], "validation labels")
        x, y = torch.cat((x, x_val)), torch.cat((y, y_val))
    n_classes = len(class_names) if class_names is not None else 1 + int(max(y.max(), y_test.max()))
    _all_present(y[:fit], n_classes, "training")
    _all_present(y_test, n_classes, "test")
    classes = named(class_names, n_classes, "")
    pieces, titles = _pieces(task, seed, n_classes, experiences, groups, names)
    domain = task.scenario == "domain"
    y_seen, y_test_seen = (_positions(pieces, n_classes, v) if domain else v for v in (y, y_test))
    plans = []
    for piece, title in zip(pieces, titles, strict=True):
        own, there = _rows(y, piece), _rows(y_test, piece)
        if validation is None:
            keep, held = hold_out(y, task.validation, among=own)
        else:
            keep, held = own[own < fit], own[own >= fit] if task.validation else no_rows()
        plans.append(
            Plan(
                name=title or "+".join(classes[c] for c in piece[:5]) + "+..." * (len(piece) > 5),
                classes=tuple(range(len(piece))) if domain else tuple(piece),
                train=Split(x, keep, y_seen),
                validation=Split(x, held, y_seen),
                test=Split(x_test, there, y_test_seen),
                labelled=task.scenario == "task",
            )
        )
    if domain:
        classes = tuple("/".join(classes[piece[i]] for piece in pieces) for i in range(len(pieces[0])))
    return finish(task, seed, plans, kind, classes, transform, vocabulary)


def task_incremental(task: Task, seed: int, **arguments: Any) -> CLScenario:
    """`class_incremental` in the task scenario, whatever the plugin's `scenario` says."""
    return class_incremental(dataclasses.replace(task, scenario="task"), seed, **arguments)


def _all_present(y: Tensor, n_classes: int, what: str) -> None:
    counts = torch.bincount(y, minlength=n_classes)
    if len(counts) > n_classes:
        raise UserError(f"{what} labels: expected 0..{n_classes - 1}, got {len(counts) - 1}")
    if not bool(counts.all()):
        raise UserError(f"{what} samples: class {int((counts == 0).nonzero()[0])} of {n_classes} has none")


def _pieces(
    task: Task,
    seed: int,
    n_classes: int,
    experiences: int | None,
    groups: Sequence[Sequence[int]] | None,
    names: Sequence[str] | None,
) -> tuple[list[list[int]], list[str]]:
    """The classes of each experience in order, and the experiences' names ('' where there is none)."""
    if groups is None:
        groups = grouped(n_classes, experiences or n_classes)
        whole = ordering(task, n_classes, seed, "classes")
    elif task.class_order == "shuffled":
        shuffled = ordering(task, len(groups), seed, "groups")
        groups = [groups[g] for g in shuffled]
        names = names and [names[g] for g in shuffled]
        whole = [c for group in groups for c in group]
    elif task.class_order == "natural":
        whole = [c for group in groups for c in group]
    else:
        whole, names = ordering(task, n_classes, seed, "classes"), None
    if sorted(whole) != list(range(n_classes)):
        raise UserError(f"groups: expected each of the {n_classes} classes 0..{n_classes - 1} in one group")
    ends = list(accumulate(map(len, groups)))
    pieces = [whole[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]
    return pieces, list(names) if names else [""] * len(pieces)


def _positions(pieces: list[list[int]], n_classes: int, y: Tensor) -> Tensor:
    """Each label's position within its experience."""
    if len(set(map(len, pieces))) > 1:
        raise UserError("stream.scenario: 'domain' needs equally many classes in every experience")
    position = torch.empty(n_classes, dtype=torch.int64)
    for piece in pieces:
        position[torch.tensor(piece)] = torch.arange(len(piece))
    return position.index_select(0, y)


def _rows(y: Tensor, classes: Sequence[int]) -> Tensor:
    """The rows of these classes, ascending."""
    return torch.isin(y, torch.tensor(list(classes))).nonzero().squeeze(1)
