"""Which parameter became which when experts split or went, and optimizer state that follows.

Libraries that drop the state make surviving experts jump at the next step; per-row state (momentum, Adam's moments) is
sliced along the expert dimension instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Source = tuple[nn.Parameter, tuple[int, ...]]


@dataclass(eq=False)
class ParameterChange:
    """Where the parameters that replace others come from.

    Attributes:
        sources: new parameter -> [(old parameter, its rows)], in the order of the new parameter's rows.
        removed: old parameters that are gone, replaced or not.
    """

    sources: dict[nn.Parameter, list[Source]] = field(default_factory=dict)
    removed: list[nn.Parameter] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sources or self.removed)

    def __add__(self, later: ParameterChange) -> ParameterChange:
        """This change followed by another, of the same layer or of a different one."""
        sources = dict(self.sources)
        for new, parts in later.sources.items():
            rows: list[tuple[nn.Parameter, int]] = []
            for old, wanted in parts:
                if old in self.sources:
                    flat = [(origin, row) for origin, kept in self.sources[old] for row in kept]
                    rows += [flat[row] for row in wanted]
                else:
                    rows += [(old, row) for row in wanted]
            sources[new] = _grouped(rows)
        for old in later.removed:
            sources.pop(old, None)
        kept = [old for old in later.removed if old not in self.sources]
        return ParameterChange(sources, [*self.removed, *kept])


def _grouped(rows: list[tuple[nn.Parameter, int]]) -> list[Source]:
    parts: list[Source] = []
    for old, row in rows:
        if parts and parts[-1][0] is old:
            parts[-1] = (old, (*parts[-1][1], row))
        else:
            parts.append((old, (row,)))
    return parts


def migrate_optimizer(
    optimizer: Optimizer, change: ParameterChange, added: Iterable[nn.Parameter] = (), group: int = 0
) -> None:
    """Make an optimizer follow a structural change, in place.

    A replaced parameter's successors take its place in its group, with its state sliced along; removed ones go.
    The order of parameters is then not that of a model which is built anew: save its state by parameter, or use
    `carry_state` with an optimizer that is built anew, as a resumed run has it.

    Args:
        optimizer: any whose per-parameter state holds scalars, tensors with one row per expert, or both (SGD, Adam,
            AdamW, RMSprop, Adagrad, Adafactor, ...).
        change: what the lifecycle operation returned.
        added: parameters without a past, for `param_groups[group]`; those that it has are skipped.
        group: index of their group.
    """
    state = dict(optimizer.state)
    successors: dict[nn.Parameter, list[nn.Parameter]] = {}
    for new, parts in change.sources.items():
        successors.setdefault(parts[0][0], []).append(new)
        carried = _sliced_state(state, parts)
        if carried is not None:
            optimizer.state[new] = carried
    removed = set(change.removed)
    for old in removed:
        optimizer.state.pop(old, None)
    known: set[Any] = set()
    for settings in optimizer.param_groups:
        parameters = []
        for parameter in settings["params"]:
            parameters += successors.get(parameter, []) if parameter in removed else [parameter]
        settings["params"] = parameters
        known.update(parameters)
    optimizer.param_groups[group]["params"] += [parameter for parameter in added if parameter not in known]


def carry_state(old: Optimizer, new: Optimizer, change: ParameterChange | None = None) -> None:
    """Give an optimizer that was built anew the state of the one before, for every parameter that survived.

    Args:
        old: the optimizer before the change; its state tensors are shared with `new`, so drop it afterwards.
        new: an optimizer of the same class over the model's present parameters.
        change: what the lifecycle operations in between returned, added up with `+`.
    """
    sources = change.sources if change is not None else {}
    for settings in new.param_groups:
        for parameter in settings["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
            elif parameter in sources:
                carried = _sliced_state(old.state, sources[parameter])
                if carried is not None:
                    new.state[parameter] = carried


def _sliced_state(state: Any, parts: list[Source]) -> dict[str, Any] | None:
    """The state of a parameter that is made of rows of others; None when one of them has none yet."""
    if any(old not in state or not state[old] for old, _ in parts):
        return None
    carried: dict[str, Any] = {}
    first = state[parts[0][0]]
    for name, value in first.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == parts[0][0].shape[0]:
            pieces = [
                state[old][name].index_select(0, torch.tensor(rows, device=state[old][name].device))
                for old, rows in parts
            ]
            carried[name] = torch.cat(pieces)
        else:  # step counts
            carried[name] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
    return carried
