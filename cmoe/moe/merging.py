"""Weighted means of experts: of their weights with hidden units in one order, and of their router columns.

By use, as M-SMoE does it (Li et al. 2023, https://arxiv.org/abs/2310.01334): what works on more tokens counts for more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cmoe.moe.alignment import matching, reordered
from cmoe.moe.optimizer import ParameterChange, Part, Row

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer

Weights = Sequence[float] | Literal["usage"] | None


def shares(layer: MoELayer, ids: Sequence[int], weights: Weights) -> list[float]:
    """What each of some experts counts, with a sum of 1.

    Args:
        layer: theirs.
        ids: the experts.
        weights: numbers, one an expert; 'usage' (tokens that it worked on while training, equal where none has any);
            None is equal.

    Raises:
        ValueError: numbers that are not as many, negative, or all 0.
    """
    if weights == "usage":
        weights = [float(layer.usage.get(expert, 0)) for expert in ids]
        weights = weights if sum(weights) else None
    if weights is None:
        return [1.0 / len(ids)] * len(ids)
    if isinstance(weights, str):
        raise ValueError(f"weights: expected numbers, 'usage' or None, got {weights!r}")
    total = math.fsum(weights)
    if len(weights) != len(ids) or min(weights) < 0 or not 0 < total < math.inf:
        raise ValueError(f"weights: expected {len(ids)} numbers from 0 with a sum above 0, got {list(weights)}")
    return [w / total for w in weights]


def kind_of(layer: MoELayer, ids: Sequence[int], what: str) -> int:
    """The one kind that all of some experts are of.

    Raises:
        ValueError: they are of several.
    """
    kinds = {layer.cohort_kinds[layer.view.where[expert][0]] for expert in ids}
    if len(kinds) != 1:
        raise ValueError(f"{what}: expected experts of one kind and size, got {list(ids)}, which are of {len(kinds)}")
    return kinds.pop()


def leading(ids: Sequence[int], weights: Sequence[float]) -> int:
    """The expert that counts most, the first among equals."""
    return max(zip(weights, (-i for i in range(len(ids))), ids, strict=True))[2]


def mixture(layer: MoELayer, ids: Sequence[int], weights: Sequence[float], align: bool) -> dict[str, Row]:
    """How each parameter of an expert is the weighted mean of those of some experts of one kind.

    Args:
        layer: theirs.
        ids: the experts.
        weights: what each counts, with a sum of 1.
        align: whether the others' hidden units are put in the order of those of the one that counts most, which comes
            first in each row.
    """
    first = leading(ids, weights)
    ordered = sorted(zip(ids, weights, strict=True), key=lambda pair: pair[0] != first)
    units = layer.cohorts[layer.view.where[first][0]].units() if align else {}
    own = _row(layer, first)
    rows: dict[str, list[Part]] = {}
    for expert, weight in ordered:
        key, row = layer.view.where[expert]
        order = matching(own, _row(layer, expert), units) if units and expert != first else None
        for name, old in layer.cohorts[key].named_parameters():
            to = None
            if order is not None and name in units:
                axis, times = units[name]
                to = partial(reordered, axis=axis, times=times, order_H=order)
            rows.setdefault(name, []).append(Part(old, row, weight, to))
    return {name: tuple(parts) for name, parts in rows.items()}


def _row(layer: MoELayer, expert: int) -> dict[str, Tensor]:
    key, row = layer.view.where[expert]
    return {name: p.detach()[row] for name, p in layer.cohorts[key].named_parameters()}


@torch.no_grad()
def summed(parts: Row) -> Tensor:
    """The sum of a row's parts.

    A weighted mean is the first part plus shares of the others' differences from it, so that equal ones stay as they are.
    """
    wide = torch.float32 if parts[0].old.dtype in (torch.bfloat16, torch.float16) else parts[0].old.dtype
    whole = [replace(part, weight=1.0).of(part.old.detach()).to(wide) for part in parts]
    if abs(math.fsum(part.weight for part in parts) - 1.0) > 1e-9:
        return torch.stack([part.weight * own for part, own in zip(parts, whole, strict=True)]).sum(0)
    value = whole[0].clone()
    for part, own in zip(parts[1:], whole[1:], strict=True):
        value += part.weight * (own - whole[0])
    return value


@torch.no_grad()
def fill(cohort: nn.Module, rows: Mapping[str, Row], noise: float = 0.0) -> None:
    """Give every expert of a cohort the same rows, with noise of its own.

    Args:
        cohort: its parameters have one row per expert.
        rows: see `mixture`.
        noise: standard deviation, in those of each parameter's own values.
    """
    for name, parameter in cohort.named_parameters():
        value = summed(rows[name])
        parameter.copy_(value.expand_as(parameter))
        if noise:
            spread = value.float().std(correction=0) if value.numel() > 1 else value.float().abs().sum()
            # drawn on the CPU, so that a seed means the same on every device
            parameter += (noise * spread * torch.randn(parameter.shape).to(spread.device)).to(parameter.dtype)


def merged_columns(
    layer: MoELayer, ids: Sequence[int], weights: Sequence[float], key: str, change: ParameterChange
) -> None:
    """Give a new cohort of one expert the weighted mean of the router columns of some; `change` learns of the parameters.

    Counts, and whatever else is no number between others, are those of the expert that counts most.
    """
    first = leading(ids, weights)
    ordered = sorted(zip(ids, weights, strict=True), key=lambda pair: pair[0] != first)
    where = [(*layer.view.where[expert], weight) for expert, weight in ordered]
    columns = layer.router.columns
    for name, parameter in columns[key].named_parameters():
        parts = tuple(Part(columns[old].get_parameter(name), row, weight) for old, row, weight in where)
        with torch.no_grad():
            parameter.copy_(summed(parts).unsqueeze(0))
        change.mixed[parameter] = [parts]
    for name, buffer in columns[key].named_buffers():
        olds = [columns[old].get_buffer(name)[row] for old, row, _ in where]
        value = olds[0].clone()
        if value.is_floating_point():
            for (_, _, weight), own in zip(where[1:], olds[1:], strict=True):
                value += weight * (own - olds[0])
        buffer.copy_(value.unsqueeze(0))
