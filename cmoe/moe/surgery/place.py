"""Modules that an operation put where others were: how they are found, described, and put into a model that is built anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cmoe.moe.kinds import Kind, Spec
from cmoe.moe.layer import MoELayer
from cmoe.moe.surgery.bare import Bare
from cmoe.moe.surgery.dense import Dense

Described = dict[str, Any]
Routers = Callable[[Mapping[str, Any]], Spec]


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one is."""
    for module in list(root.modules()):
        for key, child in list(module._modules.items()):  # `named_children` names each but once
            if child is old:
                setattr(module, key, new)


def placed(root: nn.Module) -> dict[str, Described]:
    """What operations put into a model, by name: plain containers, for `put`.

    Raises:
        ValueError: a layer has a router that has no name.
    """
    found = {name: m.described for name, m in root.named_modules() if isinstance(getattr(m, "described", None), dict)}
    for name, described in found.items():
        if described.get("router", "") is None:
            raise ValueError(f"{name}: expected a router given by name to save it, got a function")
    return found


def put(root: nn.Module, described: Mapping[str, Described], routers: Routers | None = None) -> None:
    """Put what operations put into a model into one that is newly built like it was; weights are to be loaded.

    Draws no random numbers.

    Args:
        root: the model.
        described: what `placed` gave.
        routers: makes what a router's name and options mean; default are the built-in ones.

    Raises:
        ValueError: the model itself was operated on, in another way.
    """
    here = placed(root)
    for name in here:
        if here[name] != described.get(name):
            raise ValueError(f"{name}: expected a newly built model, got one that was operated on")
    with torch.random.fork_rng(devices=[]):
        for name, what in described.items():
            if name not in here:
                old = root.get_submodule(name)
                replace(root, old, _build(old, what, routers))


def _build(old: nn.Module, what: Described, routers: Routers | None) -> nn.Module:
    like = next(old.parameters(), torch.empty(0))
    sides = {"channels_first": bool(what["channels_first"]), "after": what["after"]}
    if what["is"] == "dense":
        layer = old.layer if isinstance(old, Bare) else old
        held: dict[str, Any] = {}
        if isinstance(layer, MoELayer):
            held = {"shared": layer.shared, "base": layer.base}
        if what["expert"] is None:
            assert isinstance(layer, MoELayer)
            expert = layer.new_cohort(1, what["kind"])
        else:
            kind = Kind.of(what["expert"], what["hidden"], MoELayer.known)
            expert = kind.make(1, what["dim"], what["out_dim"])
        return Dense(expert.to(like), what, inner=what["inner"], **held, **sides).train(old.training)
    router = what["router"]
    made = MoELayer(
        what["dim"],
        what["hidden"],
        what["out_dim"],
        experts=what["experts"],
        expert=what["expert"],
        router=router if routers is None else routers(router),
        dispatch=what["dispatch"],
    ).to(like)
    if what["bare"]:
        return Bare(made, what, **sides).train(old.training)
    made.described = what
    return made.train(old.training)
