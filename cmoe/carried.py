"""Optimizer state that outlives an experience (`optimizer.reset: never`), by the name of its parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cmoe.moe.optimizer import ParameterChange, followed

State = dict[str, dict[str, Any]]


def keep(before: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """What to carry on: the optimizer's state, and for parameters that it did not train what was kept before."""
    named = dict(model.named_parameters())
    kept = {n: s for n, s in before.items() if n in named}  # a phase may train a part of the network
    return kept | {n: dict(optimizer.state[p]) for n, p in named.items() if p in optimizer.state}


def names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The names of the parameters, by which an operation's old ones are known afterwards."""
    return {parameter: name for name, parameter in model.named_parameters()}


def follow(carried: State, before: Mapping[nn.Parameter, str], model: nn.Module, change: ParameterChange) -> State:
    """What is carried on after experts were split, merged, copied or removed.

    Args:
        carried: by the names that parameters had.
        before: those names.
        model: as it is now.
        change: what became of the parameters.
    """
    held = {parameter: carried[name] for parameter, name in before.items() if name in carried}
    kept: State = {}
    for name, parameter in model.named_parameters():
        state = held.get(parameter)
        if state is None and parameter in change:
            state = followed(held, change, parameter)
        if state is not None:
            kept[name] = state
    return kept


def take(
    carried: State, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """Give a new optimizer the state of those of its parameters that survived with their shape."""
    wanted = set(parameters)
    for name, parameter in model.named_parameters():
        state = carried.get(name)
        if parameter in wanted and state is not None and all(_fits(v, parameter) for v in state.values()):
            optimizer.state[parameter] = dict(state)


def _fits(value: Any, parameter: nn.Parameter) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape
