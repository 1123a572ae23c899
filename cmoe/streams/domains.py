"""Domain-incremental streams: the same classes with other inputs, and text domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from cmoe.errors import UserError
from cmoe.streams.arrays import hold_out, named, ordering, storage
from cmoe.streams.assemble import Arrays, Plan, check_scenario, finish, pairs, same_form
from cmoe.streams.stream import Split
from cmoe.streams.task import Modality, Task
from cmoe.streams.transforms import BatchTransform

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario


def domain_incremental(
    task: Task,
    seed: int,
    *,
    train: Arrays | Sequence[Arrays],
    test: Arrays | Sequence[Arrays],
    experiences: int | None = None,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    transform: BatchTransform | None = None,
    modality: Modality | None = None,
    vocabulary: int | None = None,
) -> CLScenario:
    """Experiences with the same classes and other inputs.

    Args:
        task: the plugin, for its options.
        seed: the run's.
        train, test: a list with one (x, y) for each domain; or one tuple (x, y) that all share, told apart by the
            `transform` (a permutation, a rotation), then stored once.
        experiences: how many share one (x, y).
        class_names: one for each class.
        names: one for each domain.
        transform: raw batch -> model input; default is `task.transform()`.
        modality: default is the task's.
        vocabulary: number of token ids, for text.

    Raises:
        UserError: options that this data cannot have, or arrays that do not fit together.
    """
    check_scenario(task)
    if task.scenario == "class":
        raise UserError("stream.scenario: 'class' needs classes of each experience's own, and here all share theirs")
    kind = modality or task.modality
    shared = isinstance(train, tuple)
    if shared:
        if task.class_order != "natural":
            raise UserError("stream.class_order: expected 'natural', as all experiences share their samples")
        domains = [pairs(cast(Arrays, train), cast(Arrays, test), kind)] * (experiences or 1)
        order = list(range(len(domains)))
    else:
        domains = [pairs(a, b, kind) for a, b in zip(train, test, strict=True)]
        for x, _, _, _ in domains[1:]:
            same_form(domains[0][0], x, "training samples of a domain")
        order = ordering(task, len(domains), seed, "domains")
    x, y, x_test, y_test = domains[0] if shared else (torch.cat(column) for column in zip(*domains, strict=True))
    highest = int(max(y.max(), y_test.max()))
    n_classes = len(class_names) if class_names is not None else 1 + highest
    if highest >= n_classes:
        raise UserError(f"labels: expected 0..{n_classes - 1}, got {highest}")
    titles = named(names, len(domains), "domain ")
    plans, start, start_test = [], 0, 0
    made: dict[int, tuple[Split, Split, Split]] = {}
    for d, (_, own, _, own_test) in enumerate(domains):
        if d and shared:  # the very same tensors, so that the fingerprint reads them once
            made[d] = made[0]
            continue
        rows = torch.arange(start, start + own.shape[0])
        keep, held = hold_out(y, task.validation, among=rows)
        there = torch.arange(start_test, start_test + own_test.shape[0])
        made[d] = Split(x, keep, y), Split(x, held, y), Split(x_test, there, y_test)
        start, start_test = start + own.shape[0], start_test + own_test.shape[0]
    for d in order:
        classes = tuple(torch.unique(domains[d][1]).tolist())
        plans.append(Plan(titles[d], classes, *made[d], labelled=task.scenario == "task"))
    return finish(task, seed, plans, kind, named(class_names, n_classes, ""), transform, vocabulary)


def language(task: Task, seed: int, *, domains: Mapping[str, tuple[Any, Any, Any]], vocabulary: int) -> CLScenario:
    """Text domains for language modelling: every token but the first of a window is predicted.

    Args:
        task: the plugin, for its options.
        seed: the run's.
        domains: for each name the windows of train, validation and test, (n, L+1) token ids each.
        vocabulary: number of token ids, padding and begin included.

    Raises:
        UserError: options that this data cannot have, or arrays that do not fit together.
    """
    check_scenario(task)
    if task.scenario == "class":
        raise UserError("stream.scenario: language modelling has no classes; expected 'domain', 'task' or 'joint'")
    windows = {n: [storage(w, "bytes", f"text of '{n}'") for w in parts] for n, parts in domains.items()}
    x = torch.cat([w for parts in windows.values() for w in parts[:2]])
    x_test = torch.cat([parts[2] for parts in windows.values()])
    plans, start, start_test = [], 0, 0
    for name, (fit, held, there) in windows.items():
        middle, end, end_test = start + len(fit), start + len(fit) + len(held), start_test + len(there)
        splits = [
            Split(storage_, torch.arange(a, b), None)
            for storage_, a, b in ((x, start, middle), (x, middle, end), (x_test, start_test, end_test))
        ]
        plans.append(Plan(name, (), *splits, labelled=task.scenario == "task"))
        start, start_test = end, end_test
    order = ordering(task, len(plans), seed, "domains")
    return finish(task, seed, [plans[d] for d in order], task.modality, vocabulary=vocabulary)
