"""What an operation on a model did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from cmoe.moe.layer import MoELayer
from cmoe.moe.optimizer import ParameterChange

Ids = Iterable[int] | Mapping[str, Iterable[int]]
Seeded = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Event:
    """A change in the life of experts.

    Attributes:
        kind: 'added', 'upcycled' (added as copies of a dense network), 'frozen', 'thawed', 'assigned', 'removed', 'merged' or
            'collapsed' (the layer is a dense network now).
        layer: name of the layer.
        experts: ids.
        into: the expert that merged ones became.
    """

    kind: str
    layer: str
    experts: tuple[int, ...]
    into: int | None = None


@dataclass
class Surgery:
    """What an operation on a model did; two add up with `+`.

    Attributes:
        events: what happened to experts, for a timeline; changes of no expert are none.
        change: what became of parameters, for `migrate_optimizer(optimizer, surgery.change, model.parameters())`.
        new: ids of new experts by layer.
        errors: for layers that were distilled, the relative squared error of the dense network on the tokens, before
            training and after it.
    """

    events: list[Event] = field(default_factory=list)
    change: ParameterChange = field(default_factory=ParameterChange)
    new: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def note(self, kind: str, layer: str, experts: Iterable[int], into: int | None = None) -> None:
        """Add an event with ids in order, unless it is about no expert."""
        if ids := tuple(sorted(experts)):
            self.events.append(Event(kind, layer, ids, into))

    def __add__(self, later: Surgery) -> Surgery:
        new = {name: [*self.new.get(name, []), *later.new.get(name, [])] for name in {**self.new, **later.new}}
        return Surgery(self.events + later.events, self.change + later.change, new, {**self.errors, **later.errors})


def home(model: nn.Module) -> nn.Module:
    """The part of a model in which layers are named: the backbone of one that has a head beside it."""
    backbone = getattr(model, "backbone", None)
    return backbone if hasattr(model, "moe_layers") and isinstance(backbone, nn.Module) else model


def layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers of experts by their names, in the order of depth.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in home(model).named_modules() if isinstance(module, MoELayer)}
    if not found:
        raise ValueError(f"expected a model with layers of experts, got {type(model).__name__} without any")
    return found


def each(model: nn.Module, ids: Ids) -> list[tuple[str, MoELayer, list[int]]]:
    """Every layer that is meant, with the ids that are.

    Args:
        model: theirs.
        ids: the same ids in every layer, or ids by layer name.

    Raises:
        ValueError: there is no layer of that name.
    """
    known = layers(model)
    if not isinstance(ids, Mapping):
        same = list(ids)
        return [(name, layer, same) for name, layer in known.items()]
    wanted = cast("Mapping[str, Iterable[int]]", ids)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"expected layers among {list(known)}, got {unknown[0]!r}")
    return [(name, layer, list(wanted[name])) for name, layer in known.items() if name in wanted]


def unseeded(name: str) -> AbstractContextManager:
    """Random numbers come from wherever they would."""
    return nullcontext()
