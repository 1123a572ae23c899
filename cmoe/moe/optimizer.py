"""Which parameter became which when experts split, merged, came from elsewhere or went, and optimizer state that follows.

Libraries that drop the state make surviving experts jump at the next step; per-row state (momentum, Adam's moments) is
sliced along the expert dimension instead, bit for bit. Where several rows became one (experts that were merged) the state
is the same weighted mean as that of the weights, hidden units in the same order: exact for momentum, which is linear in
the gradients; and a mean of second moments is no less than the square of the mean of the first, so that no merged weight
takes a larger step than Adam allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Source = tuple[nn.Parameter, tuple[int, ...]]
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """What an old parameter gives to a row of a new one.

    Attributes:
        old: the parameter.
        row: the row of it; None is all of it (a dense network's weight).
        weight: its share.
        to: makes the new row's shape of the old one's (another order of units, transposed); linear, None leaves it.
    """

    old: nn.Parameter
    row: int | None
    weight: float = 1.0
    to: Callable[[Tensor], Tensor] | None = None

    def of(self, value: Tensor) -> Tensor:
        """The share of a tensor of the old parameter's shape: of itself, or of its state."""
        own = value if self.row is None else value[self.row]
        own = own if self.to is None else self.to(own)
        return own if self.weight == 1.0 else own * self.weight

    def plain(self) -> bool:
        """Whether it is a row as it was."""
        return self.row is not None and self.weight == 1.0 and self.to is None


Row = tuple[Part, ...]  # a new row is the sum of its parts; without any it has no past


@dataclass(eq=False)
class ParameterChange:
    """Where the parameters that replace others come from.

    Attributes:
        sources: new parameter -> [(old parameter, its rows)], in the order of the new parameter's rows.
        mixed: new parameters whose rows are no copies -> the parts of each row.
        removed: old parameters that are gone, replaced or not.
    """

    sources: dict[nn.Parameter, list[Source]] = field(default_factory=dict)
    mixed: dict[nn.Parameter, list[Row]] = field(default_factory=dict)
    removed: list[nn.Parameter] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sources or self.mixed or self.removed)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self.sources or parameter in self.mixed

    def __iter__(self) -> Iterator[nn.Parameter]:
        """The new parameters."""
        yield from self.sources
        yield from self.mixed

    def rows(self, new: nn.Parameter) -> list[Row]:
        """The parts of each row of a new parameter."""
        if new in self.mixed:
            return self.mixed[new]
        return [(Part(old, row),) for old, rows in self.sources[new] for row in rows]

    def __add__(self, later: ParameterChange) -> ParameterChange:
        """This change followed by another, of the same layer or of a different one."""
        total = ParameterChange(dict(self.sources), dict(self.mixed), list(self.removed))
        before = {old: self.rows(old) for new in later for old in later.olds(new) if old in self}
        for new in later:
            rows = [tuple(p for part in row for p in _before(part, before)) for row in later.rows(new)]
            if all(len(row) == 1 and row[0].plain() for row in rows):
                total.sources[new] = _grouped([(row[0].old, row[0].row) for row in rows])
            else:
                total.mixed[new] = rows
        for old in later.removed:
            total.sources.pop(old, None)
            total.mixed.pop(old, None)
        total.removed += [old for old in later.removed if old not in self]
        return total

    def olds(self, new: nn.Parameter) -> list[nn.Parameter]:
        """The old parameters that a new one is made of, the first one first."""
        if new in self.sources:
            return list(dict.fromkeys(old for old, _ in self.sources[new]))
        return list(dict.fromkeys(part.old for row in self.mixed[new] for part in row))


def _before(part: Part, earlier: Mapping[nn.Parameter, list[Row]]) -> Row:
    """A part in terms of what its parameter was made of."""
    if part.old not in earlier:
        return (part,)
    if part.row is None:  # all rows of one that was made of others at once: nothing does that
        return ()
    return tuple(
        Part(p.old, p.row, p.weight * part.weight, _chained(p.to, part.to)) for p in earlier[part.old][part.row]
    )


def _chained(
    first: Callable[[Tensor], Tensor] | None, second: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor] | None:
    if first is None or second is None:
        return first or second
    return lambda value: second(first(value))


def _grouped(rows: list[tuple[nn.Parameter, int | None]]) -> list[Source]:
    parts: list[Source] = []
    for old, row in rows:
        assert row is not None
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
    removed = set(change.removed)
    successors: dict[nn.Parameter, list[nn.Parameter]] = {}
    for new in change:
        heir = next((old for old in change.olds(new) if old in removed), None)
        if heir is not None:
            successors.setdefault(heir, []).append(new)
        carried = followed(state, change, new)
        if carried is not None:
            optimizer.state[new] = carried
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
    change = ParameterChange() if change is None else change
    for settings in new.param_groups:
        for parameter in settings["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
            elif parameter in change:
                carried = followed(old.state, change, parameter)
                if carried is not None:
                    new.state[parameter] = carried


def followed(state: Mapping[Any, State], change: ParameterChange, new: nn.Parameter) -> State | None:
    """The optimizer state of a new parameter; None when one of those that it is made of has none yet.

    Steps of several are the most of them. State of another shape than the weights' (Adafactor's statistics) can be
    sliced, not mixed: where rows are no copies it begins anew.
    """
    if any(not state.get(old) for old in change.olds(new)):
        return None
    return _sliced(state, change.sources[new]) if new in change.sources else _mixed(state, change.mixed[new])


def _sliced(state: Mapping[Any, State], parts: list[Source]) -> State:
    carried: State = {}
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


def _mixed(state: Mapping[Any, State], rows: list[Row]) -> State | None:
    if not all(rows):
        return None
    parts = [part for row in rows for part in row]
    carried: State = {}
    for name, value in state[parts[0].old].items():
        held = [state[part.old].get(name) for part in parts]
        if not isinstance(value, Tensor):
            carried[name] = copy.copy(value)
        elif value.dim() == 0:
            carried[name] = torch.stack(held).max()  # ty: ignore[invalid-argument-type]
        elif all(isinstance(h, Tensor) and h.shape == part.old.shape for h, part in zip(held, parts, strict=True)):
            made = [torch.stack([part.of(state[part.old][name]) for part in row]).sum(0) for row in rows]
            carried[name] = torch.stack(made)
        else:
            return None
    return carried
