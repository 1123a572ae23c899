"""Experts as a run-time resource: add, freeze, thaw, remove; parts of cohorts split off.

A parameter holds the rows of one cohort, so acting on part of a cohort replaces parameters; each operation says which
new parameter comes from which rows of which old one (`ParameterChange`, see `optimizer.py`). `MoELayer` has the methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from cmoe.moe.optimizer import ParameterChange

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer


def add(
    layer: MoELayer, n: int, init: str, source: int | None, tasks: Iterable[int] | int | None, kind: int = 0
) -> list[int]:
    """See `MoELayer.add_experts`."""
    if n < 1:
        raise ValueError(f"add_experts: expected at least 1, got {n}")
    if init not in ("fresh", "copy", "zero"):
        raise ValueError(f"init: expected 'fresh', 'copy' or 'zero', got {init!r}")
    if source is not None:
        layer.check_ids([source])
    elif init == "copy":
        alike = [e for e in sorted(layer.ids) if layer.cohort_kinds[layer.view.where[e][0]] == kind]
        if not alike:
            raise ValueError("init: copy is not possible for the first experts of a kind")
        source = max(alike, key=lambda expert: layer.usage.get(expert, 0))
    cohort = layer.new_cohort(n, kind)
    if init == "copy":
        assert source is not None
        key, row = layer.view.where[source]
        if layer.cohort_kinds[key] != kind:
            raise ValueError(f"source: expected an expert of the same kind, got {source}")
        with torch.no_grad():
            for new, old in zip(cohort.parameters(), layer.cohorts[key].parameters(), strict=True):
                new.copy_(old[row : row + 1].expand_as(new))
    else:
        cohort.reset_parameters()
        if init == "zero":
            cohort.zero_output()
    key, ids = layer.new_key(), layer.new_ids(n)
    layer.install(key, cohort, fresh=True)
    layer.cohort_kinds[key] = kind
    for task in [tasks] if isinstance(tasks, int) else tasks or ():
        layer.tasks[task] = (*layer.tasks.pop(task, ()), *ids)  # popped, so that it is the last one assigned
    layer.set_cohorts({**layer.cohort_ids, key: ids})
    return list(ids)


def take(module: nn.Module, rows: Sequence[int], change: ParameterChange) -> nn.Module:
    """A copy of a stacked module with these rows of every parameter and buffer; `change` learns of the parameters.

    Parameters keep `requires_grad`. The old module stays as it is.
    """
    taken = copy.deepcopy(module)
    for (_, old_part), (_, part) in zip(module.named_modules(), taken.named_modules(), strict=True):
        for name, old in old_part.named_parameters(recurse=False):
            index = torch.tensor(rows, dtype=torch.int64, device=old.device)
            new = nn.Parameter(old.detach().index_select(0, index), requires_grad=old.requires_grad)
            part.register_parameter(name, new)
            change.sources[new] = [(old, tuple(rows))]
        for name, buffer in old_part.named_buffers(recurse=False):
            index = torch.tensor(rows, dtype=torch.int64, device=buffer.device)
            part._buffers[name] = buffer.index_select(0, index)
        if hasattr(part, "n"):
            part.n = len(rows)
    return taken


def isolate(layer: MoELayer, ids: Iterable[int]) -> tuple[list[str], ParameterChange]:
    """Make cohorts that hold exactly these experts, splitting where only a part of one is meant.

    The rest keeps the cohort's key; the part gets a new key right after it. Whole cohorts are left as they are.

    Returns:
        The keys of the cohorts that hold the experts, and what became of the parameters.

    Raises:
        ValueError: an id is unknown.
    """
    wanted = set(ids)
    layer.check_ids(wanted)
    change = ParameterChange()
    keys: list[str] = []
    members: dict[str, tuple[int, ...]] = {}
    for key, experts in layer.cohort_ids.items():
        inside = [row for row, expert in enumerate(experts) if expert in wanted]
        if not inside or len(inside) == len(experts):
            members[key] = experts
            keys += [key] if inside else []
            continue
        outside = [row for row, expert in enumerate(experts) if expert not in wanted]
        part = layer.new_key()
        for modules in layer.stacked_modules():
            if key in modules:
                whole = modules[key]
                change.removed += list(whole.parameters())
                modules[key], modules[part] = take(whole, outside, change), take(whole, inside, change)
        if key in layer.frozen_keys:
            layer.frozen_keys.add(part)
        layer.cohort_kinds[part] = layer.cohort_kinds[key]
        members[key] = tuple(experts[row] for row in outside)
        members[part] = tuple(experts[row] for row in inside)
        keys.append(part)
    if change:
        layer.set_cohorts(members)
    return keys, change


def set_frozen(layer: MoELayer, ids: Iterable[int], frozen: bool) -> ParameterChange:
    """Freeze or thaw experts together with their router columns."""
    ids = set(ids)
    layer.check_ids(ids)
    # those that are as wanted already need no split
    keys, change = isolate(layer, ids - layer.frozen_ids if frozen else ids & layer.frozen_ids)
    for key in keys:
        (layer.frozen_keys.add if frozen else layer.frozen_keys.discard)(key)
    layer.apply_frozen()
    return change


def remove(layer: MoELayer, ids: Iterable[int]) -> ParameterChange:
    """Remove experts with their router columns; every other expert keeps its id.

    Raises:
        ValueError: an id is unknown, or no expert would be left.
    """
    gone = set(ids)
    layer.check_ids(gone)
    if not set(layer.ids) - gone:
        raise ValueError("remove: a layer needs at least one expert")
    change = ParameterChange()
    members: dict[str, tuple[int, ...]] = {}
    for key, experts in layer.cohort_ids.items():
        kept = [row for row, expert in enumerate(experts) if expert not in gone]
        if len(kept) < len(experts):
            for modules in layer.stacked_modules():
                if key in modules:
                    whole = modules[key]
                    change.removed += list(whole.parameters())
                    if kept:
                        modules[key] = take(whole, kept, change)
                    else:
                        del modules[key]
        if kept:
            members[key] = tuple(experts[row] for row in kept)
        else:
            layer.frozen_keys.discard(key)
    for task, experts in list(layer.tasks.items()):
        left = tuple(expert for expert in experts if expert not in gone)
        if left:
            layer.tasks[task] = left
        else:
            del layer.tasks[task]
    layer.set_cohorts(members)
    for expert in gone:
        layer.usage.pop(expert, None)
    return change
