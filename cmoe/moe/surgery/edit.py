"""The life of experts in all layers of a model at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from cmoe.moe.layer import MoELayer
from cmoe.moe.lifecycle import of_kind
from cmoe.moe.merging import Weights
from cmoe.moe.surgery.observe import Run, Seen, observe
from cmoe.moe.surgery.report import Ids, Seeded, Surgery, each, layers, unseeded


def add_experts(
    model: nn.Module,
    n: int,
    init: Literal["fresh", "copy", "nearest", "interpolated", "zero"] = "fresh",
    *,
    tasks: Iterable[int] | int | None = None,
    run: Run | None = None,
    seeded: Seeded = unseeded,
    **options: Any,
) -> Surgery:
    """Add experts to every layer; see `MoELayer.add_experts`.

    Args:
        model: with layers of experts.
        n: how many in each.
        init: what they begin with.
        tasks: task labels that they are assigned to.
        run: for 'nearest', calls the model on the new data (`observe`).
        seeded: a context manager for a layer's name, inside which its new weights are drawn.
        options: `source`, `sources`, `weights`, `align`, `noise`, `expert`, `hidden`.

    Raises:
        ValueError: as `MoELayer.add_experts`, or 'nearest' without `run`.
    """
    done = Surgery()
    tasks = [tasks] if isinstance(tasks, int) else list(tasks or ())
    if init == "nearest" and run is None:
        raise ValueError("init: nearest needs run, a function that calls the model on the new data")
    seen = observe(model, run, limit=0) if init == "nearest" and run is not None else {}
    for name, layer in layers(model).items():
        own: dict[str, Any] = dict(options)
        if name in seen:
            own = {**options, "source": _busiest(layer, seen[name], options)}
        with seeded(name):
            new = layer.add_experts(n, "copy" if name in seen else init, tasks=tasks, **own)
        done.new[name] = new
        done.note("added", name, new)
    return done


def _busiest(layer: MoELayer, seen: Seen, options: dict[str, Any]) -> int | None:
    """The expert of the new ones' kind that was given most."""
    expert, hidden = options.get("expert"), options.get("hidden")
    kind = 0 if expert is None and hidden is None else layer.kind_number(expert, hidden)
    alike = of_kind(layer, kind)
    return max(alike, key=lambda e: seen.mass.get(e, 0.0)) if alike else None


def freeze(model: nn.Module, ids: Ids | None = None) -> Surgery:
    """Freeze experts, all without `ids` (the same in every layer, or by layer); those that are frozen stay so."""
    return _set_frozen(model, ids, True)


def thaw(model: nn.Module, ids: Ids | None = None) -> Surgery:
    """Let frozen experts learn again; arguments as for `freeze`."""
    return _set_frozen(model, ids, False)


def _set_frozen(model: nn.Module, ids: Ids | None, frozen: bool) -> Surgery:
    done = Surgery()
    if ids is None:
        ids = {name: layer.ids for name, layer in layers(model).items()}
    for name, layer, own in each(model, ids):
        changed = [expert for expert in own if (expert in layer.frozen_ids) != frozen]
        done.change += layer.freeze(own) if frozen else layer.thaw(own)
        done.note("frozen" if frozen else "thawed", name, changed)
    return done


def remove(model: nn.Module, ids: Ids) -> Surgery:
    """Remove experts, the same in every layer or by layer; see `MoELayer.remove`."""
    done = Surgery()
    for name, layer, own in each(model, ids):
        done.change += layer.remove(own)
        done.note("removed", name, own)
    return done


def assign(model: nn.Module, ids: Ids, task: int) -> Surgery:
    """Let exactly these experts work for a task label, the same in every layer or by layer; see `MoELayer.assign`."""
    done = Surgery()
    for name, layer, own in each(model, ids):
        layer.assign(own, task)
        done.note("assigned", name, own)
    return done


def prune(model: nn.Module, keep: int | None = None, below: float | None = None, assigned: bool = False) -> Surgery:
    """Remove the experts of each layer that were used least; see `MoELayer.prune`."""
    done = Surgery()
    for name, layer in layers(model).items():
        gone, change = layer.prune(keep, below, assigned)
        done.change += change
        done.note("removed", name, gone)
    return done


def reset_usage(model: nn.Module) -> None:
    """Count the experts' use anew from here."""
    for layer in layers(model).values():
        layer.reset_usage()


def merge(
    model: nn.Module,
    ids: Ids | None = None,
    *,
    until: int | None = None,
    pairs: Literal["unused", "used", "alike"] = "unused",
    weights: Weights = "usage",
    align: bool = True,
    run: Run | None = None,
) -> Surgery:
    """Make one expert of several in each layer, or of pairs until a layer has few enough; see `MoELayer.merge`.

    Args:
        model: with layers of experts.
        ids: those that become one, the same in every layer or by layer.
        until: instead of `ids`: merge pairs of one kind until this many are left.
        pairs: which: the two that are 'unused' most, the two most 'used' (Park 2024), or the two most 'alike', whose
            outputs on what comes while `run` works differ least (as in HC-SMoE, which merges by outputs).
        weights: what each counts.
        align: put hidden units in one order first.
        run: for 'alike', calls the model on some inputs (`observe`).

    Raises:
        ValueError: as `MoELayer.merge`; not one of ids and until; or 'alike' without `run`.
    """
    if (ids is None) == (until is None):
        raise ValueError("merge: expected one of ids and until")
    if until is not None and until < 1:
        raise ValueError(f"merge: until: expected at least 1, got {until}")
    if pairs not in ("unused", "used", "alike"):
        raise ValueError(f"merge: pairs: expected 'unused', 'used' or 'alike', got {pairs!r}")
    if pairs == "alike" and until is not None and run is None:
        raise ValueError("merge: pairs: alike needs run, a function that calls the model")
    done = Surgery()
    if ids is not None:
        for name, layer, own in each(model, ids):
            _merge(done, name, layer, own, weights, align)
        return done
    assert until is not None
    seen = observe(model, run) if pairs == "alike" and run is not None else {}
    for name, layer in layers(model).items():
        while len(layer.ids) > until and (pair := _pair(layer, pairs, seen.get(name))):
            _merge(done, name, layer, pair, weights, align)
    return done


def _merge(done: Surgery, name: str, layer: MoELayer, ids: list[int], weights: Weights, align: bool) -> None:
    new, change = layer.merge(ids, weights, align)
    done.change += change
    done.new.setdefault(name, []).append(new)
    done.note("merged", name, ids, new)
    done.note("added", name, [new])
    done.note("frozen", name, {new} & layer.frozen_ids)  # as all of them were


def _pair(layer: MoELayer, which: str, seen: Seen | None) -> list[int] | None:
    """The two experts of one kind that come first by a rule; None where no two are of a kind."""
    by_kind: dict[int, list[int]] = {}
    for expert in layer.ids:
        by_kind.setdefault(layer.cohort_kinds[layer.view.where[expert][0]], []).append(expert)
    groups = [ids for ids in by_kind.values() if len(ids) > 1]
    if not groups:
        return None
    works_alone = type(layer).forward is MoELayer.forward  # a head of attention gives nothing for a token by itself
    if which == "alike" and seen is not None and len(seen.tokens) and works_alone:
        return min((_nearest_outputs(layer, ids, seen) for ids in groups), key=lambda found: found[0])[1]
    sign = -1 if which == "used" else 1
    ranked = [sorted(ids, key=lambda e: (sign * layer.usage.get(e, 0), e))[:2] for ids in groups]
    return min(ranked, key=lambda pair: (sign * sum(layer.usage.get(e, 0) for e in pair), pair))


@torch.no_grad()
def _nearest_outputs(layer: MoELayer, ids: list[int], seen: Seen) -> tuple[float, list[int]]:
    """The two experts whose outputs differ least, as a share of their own size, and by how much."""
    outputs = []
    for expert in ids:
        key, row = layer.view.where[expert]
        outputs.append(layer.cohorts[key].single(seen.tokens, row).double().flatten())
    made_EN = torch.stack(outputs)
    gram = made_EN @ made_EN.t()
    size = gram.diagonal()
    apart = (size + size.unsqueeze(1) - 2 * gram) / (size + size.unsqueeze(1)).clamp(min=1e-300)
    apart = apart.masked_fill(torch.ones_like(apart, dtype=torch.bool).tril(), float("inf"))
    best = int(apart.argmin())
    return float(apart.flatten()[best]), sorted([ids[best // len(ids)], ids[best % len(ids)]])
