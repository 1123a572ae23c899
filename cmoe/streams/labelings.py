"""Several labelings of the same samples: multi-task learning as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cmoe.errors import UserError, nearest
from cmoe.streams.arrays import hold_out, labels, ordering, storage
from cmoe.streams.assemble import Plan, check_scenario, finish, same_form
from cmoe.streams.stream import Split
from cmoe.streams.task import Modality, Task
from cmoe.streams.transforms import BatchTransform

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario


def attributes(
    task: Task,
    seed: int,
    *,
    train: tuple[Any, Mapping[str, Any]],
    test: tuple[Any, Mapping[str, Any]],
    class_names: Mapping[str, Sequence[str]],
    transform: BatchTransform | None = None,
    modality: Modality | None = None,
) -> CLScenario:
    """Several labelings of the same samples, an experience each. The task label is always given.

    Args:
        task: the plugin, for its options; its scenarios are 'joint', 'task' or 'online'.
        seed: the run's.
        train, test: (x, {attribute: (N,) labels}).
        class_names: each attribute's classes; labels are numbered on from one attribute to the next.
        transform: raw batch -> model input; default is `task.transform()`.
        modality: default is the task's.

    Raises:
        UserError: options that this data cannot have, or arrays that do not fit together.
    """
    check_scenario(task)
    kind = modality or task.modality
    x, x_test = storage(train[0], kind, "training samples"), storage(test[0], kind, "test samples")
    same_form(x, x_test, "test samples")
    plans, names = [], []
    together = torch.zeros(x.shape[0], dtype=torch.int64)
    rows_test = torch.arange(x_test.shape[0])
    labelled = []
    for attribute, own in class_names.items():
        columns = []
        for rows, (_, given) in ((x.shape[0], train), (x_test.shape[0], test)):
            if attribute not in given:
                raise UserError(f"attributes: no labels for '{attribute}'{nearest(attribute, given)}")
            y = labels(given[attribute], rows, f"labels of {attribute}")
            if rows and int(y.max()) >= len(own):
                raise UserError(f"labels of {attribute}: expected 0..{len(own) - 1}, got {int(y.max())}")
            columns.append(y)
        together = together * len(own) + columns[0]
        labelled.append((attribute, columns[0] + len(names), columns[1] + len(names), len(names), len(own)))
        names += [f"{attribute}={c}" for c in own]
    # held out by all labelings at once: a sample is for validation in every task or in none
    keep, held = hold_out(together, task.validation)
    for d in ordering(task, len(labelled), seed, "attributes"):
        attribute, y, y_test, offset, count = labelled[d]
        splits = Split(x, keep, y), Split(x, held, y), Split(x_test, rows_test, y_test)
        plans.append(Plan(attribute, tuple(range(offset, offset + count)), *splits, labelled=True))
    return finish(task, seed, plans, kind, names, transform)
