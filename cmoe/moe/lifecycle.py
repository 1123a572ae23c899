"""Experts as a run-time resource: add, freeze, thaw, remove, merge, prune; parts of cohorts split off.

A parameter holds the rows of one cohort, so acting on part of a cohort replaces parameters; each operation says which
new parameter comes from which rows of which old one (`ParameterChange`, see `optimizer.py`). `MoELayer` has the methods,
`cmoe.moe.surgery` does the same to all layers of a model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmoe.moe.merging import Weights, fill, kind_of, leading, merged_columns, mixture, shares
from cmoe.moe.optimizer import ParameterChange
from cmoe.moe.routing import NO_CONTEXT, MergeRouting, RouteContext, Routing, SoftRouting, UniformRouting
from cmoe.moe.view import NONE

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer

INITS = ("fresh", "copy", "nearest", "interpolated", "zero")


def add(
    layer: MoELayer,
    n: int,
    init: str,
    source: int | None,
    tasks: Iterable[int] | int | None,
    kind: int = 0,
    *,
    sources: Sequence[int] | None = None,
    weights: Weights = "usage",
    align: bool = True,
    tokens: Tensor | None = None,
    context: RouteContext | None = None,
    noise: float = 0.0,
) -> list[int]:
    """See `MoELayer.add_experts`."""
    if n < 1:
        raise ValueError(f"add_experts: expected at least 1, got {n}")
    labels = [tasks] if isinstance(tasks, int) else list(tasks or ())
    if labels and min(labels) < 0:
        raise ValueError(f"tasks: expected labels from 0, got {min(labels)}")
    if init not in INITS:
        raise ValueError(f"init: expected one of {INITS}, got {init!r}")
    drawn = init in ("fresh", "zero")
    if noise < 0 or (noise and drawn):
        raise ValueError(f"noise: expected 0 with init {init!r}, or a number from 0 with copies, got {noise}")
    cohort = layer.new_cohort(n, kind)
    if drawn:
        cohort.reset_parameters()
        if init == "zero":
            cohort.zero_output()
    else:
        origins = _origins(layer, init, source, sources, kind, tokens, context)
        counts = shares(layer, origins, weights)
        cohort = cohort.to(layer.like)
        fill(cohort, mixture(layer, origins, counts, align), noise)
    key, ids = layer.new_key(), layer.new_ids(n)
    layer.install(key, cohort, fresh=True)
    layer.cohort_kinds[key] = kind
    for task in labels:
        layer.tasks[task] = (*layer.tasks.pop(task, ()), *ids)  # popped, so that it is the last one assigned
    layer.set_cohorts({**layer.cohort_ids, key: ids})
    return list(ids)


def _origins(
    layer: MoELayer,
    init: str,
    source: int | None,
    sources: Sequence[int] | None,
    kind: int,
    tokens: Tensor | None,
    context: RouteContext | None,
) -> list[int]:
    """The experts whose weights new ones of a kind begin with."""
    given = [source] if source is not None else list(sources or ())
    layer.check_ids(given)
    alike = of_kind(layer, kind)
    if not alike:
        raise ValueError(f"init: {init} is not possible for the first experts of a kind")
    if wrong := [e for e in given if e not in alike]:
        raise ValueError(f"source: expected an expert of the same kind, got {wrong[0]}")
    if init == "interpolated":
        return given or alike
    if init == "nearest":
        if tokens is None:
            raise ValueError("init: nearest needs tokens of the new data")
        mass = routed(layer, tokens, context)
        return [max(alike, key=lambda expert: mass.get(expert, 0.0))]
    return given[:1] or [max(alike, key=lambda expert: layer.usage.get(expert, 0))]


def of_kind(layer: MoELayer, kind: int) -> list[int]:
    """The experts of one of a layer's kinds, in the order of their ids."""
    return [expert for expert in sorted(layer.ids) if layer.cohort_kinds[layer.view.where[expert][0]] == kind]


@torch.no_grad()
def routed(layer: MoELayer, tokens: Tensor, context: RouteContext | None = None) -> dict[int, float]:
    """How much of some tokens the router gives to each expert, by id: the sum of the weights, as in evaluation.

    Args:
        layer: it is left as it is, its counters and the generators of random numbers included.
        tokens: (N, D), or larger units as the layer takes them.
        context: what else is known about them.
    """
    modes = [(module, module.training) for module in layer.router.modules()]
    layer.router.eval()
    try:
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            context = replace(context or NO_CONTEXT, training=False)
            return mass(layer.route(tokens, context), layer.ids)
    finally:
        for module, mode in modes:
            module.training = mode


def mass(routing: Routing, ids: Sequence[int]) -> dict[int, float]:
    """The sum of the weights that a routing gives to each expert."""
    columns = routing.columns or tuple(ids)
    if isinstance(routing, UniformRouting):
        tokens = routing.tokens if routing.valid is None else int(routing.valid.sum())
        return dict.fromkeys(routing.experts, tokens / len(routing.experts))
    if isinstance(routing, SoftRouting):
        each_E = routing.dispatch_GLS.sum((0, 1)).view(len(columns), routing.slots).sum(1)
        return dict(zip(columns, each_E.tolist(), strict=True))
    if isinstance(routing, MergeRouting):
        return dict(zip(columns, routing.weights_GE.sum(0).tolist(), strict=True))
    given = routing.ids != NONE
    total = routing.weights.new_zeros(max(ids) + 1, dtype=torch.float64)
    total.index_add_(0, routing.ids[given], routing.weights[given].double())
    return {expert: float(total[expert]) for expert in ids}


def take(module: nn.Module, rows: Sequence[int], change: ParameterChange) -> nn.Module:
    """A copy of a stacked module with these rows of every parameter and buffer; `change` learns of the parameters.

    Parameters keep `requires_grad`. The old module stays as it is. A module whose parameters have other rows than one for
    each expert says itself what a part of it is (`taken(rows, change)`).
    """
    own_way = getattr(module, "taken", None)
    if own_way is not None:
        return own_way(rows, change)
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
    if members != layer.cohort_ids:  # experts without parameters split without a change of any
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
    layer.set_cohorts(layer.cohort_ids)  # routers learn some things without a gradient: they are told what is frozen
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


def merge(layer: MoELayer, ids: Iterable[int], weights: Weights, align: bool) -> tuple[int, ParameterChange]:
    """See `MoELayer.merge`."""
    old = list(dict.fromkeys(ids))
    layer.check_ids(old)
    if len(old) < 2:
        raise ValueError(f"merge: expected at least two experts, got {old}")
    kind, counts = kind_of(layer, old, "merge"), shares(layer, old, weights)
    rows = mixture(layer, old, counts, align)
    cohort = layer.new_cohort(1, kind).to(layer.like)
    fill(cohort, rows)
    key, (new,) = layer.new_key(), layer.new_ids(1)
    layer.install(key, cohort, fresh=False)
    change = ParameterChange(mixed={p: [rows[name]] for name, p in layer.cohorts[key].named_parameters()})
    columns = layer.router.columns
    if key in columns and hasattr(columns[key], "taken"):  # no row for each expert: those of the one that counts most
        whose, row = layer.view.where[leading(old, counts)]
        columns[key] = take(columns[whose], [row], change)
    elif key in columns:
        merged_columns(layer, old, counts, key, change)
    layer.cohort_kinds[key] = kind
    if set(old) <= layer.frozen_ids:
        layer.frozen_keys.add(key)
    for task, experts in layer.tasks.items():
        layer.tasks[task] = tuple(dict.fromkeys(new if expert in old else expert for expert in experts))
    layer.set_cohorts({**layer.cohort_ids, key: (new,)})
    if total := sum(layer.usage.get(expert, 0) for expert in old):
        layer.usage[new] = total
    change = change + remove(layer, old)
    layer.apply_frozen()
    return new, change


def prune(layer: MoELayer, keep: int | None, below: float | None, assigned: bool) -> tuple[list[int], ParameterChange]:
    """See `MoELayer.prune`."""
    if (keep is None) == (below is None):
        raise ValueError("prune: expected one of keep and below")
    if (keep is not None and keep < 1) or (below is not None and not 0 <= below <= 1):
        raise ValueError(f"prune: expected keep from 1, or below from 0 to 1, got keep={keep}, below={below}")
    used = {expert: layer.usage.get(expert, 0) for expert in layer.ids}
    total = sum(used.values())
    if not total:
        raise ValueError("prune: expected experts whose use was counted, got none (use is counted while training)")
    ranked = sorted(used, key=lambda expert: (-used[expert], expert))
    if keep is not None:
        gone = ranked[keep:]
    else:
        assert below is not None
        gone = [expert for expert in ranked[1:] if used[expert] / total < below]
    if not assigned:
        held = {expert for experts in layer.tasks.values() for expert in experts}
        gone = [expert for expert in gone if expert not in held]
    return sorted(gone), remove(layer, gone) if gone else ParameterChange()
