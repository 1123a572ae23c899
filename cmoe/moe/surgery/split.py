"""Splitting one network's hidden units among experts (MoEfication, Zhang et al. 2021, https://arxiv.org/abs/2110.01786)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cmoe.moe.routers.parts.select import auction


@torch.no_grad()
def clusters(x_HF: Tensor, k: int, generator: torch.Generator, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Balanced k-means: groups of equal size whose members point in similar directions.

    Args:
        x_HF: what is grouped, H divisible by k.
        k: groups.
        generator: draws the first centres.
        rounds: at most so many times are the centres moved.

    Returns:
        (k, H / k) members of each group in ascending order, and (k, F) the centres.
    """
    x = torch.nn.functional.normalize(x_HF.detach().double().cpu(), dim=1)
    h = len(x)
    centre = x.index_select(0, _spread(x, k, generator))
    group_H = torch.zeros(h, dtype=torch.int64)
    for _ in range(rounds):
        # the assignment with the highest sum of similarities among those with equal groups
        now_H = auction(x @ centre.t())
        if torch.equal(now_H, group_H):
            break
        group_H = now_H
        total = torch.zeros_like(centre).index_add_(0, group_H, x)
        centre = torch.nn.functional.normalize(total, dim=1)
    return group_H.argsort(stable=True).view(k, h // k), centre


def _spread(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """First centres far from each other (k-means++)."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    apart = torch.full((len(x),), torch.inf, dtype=x.dtype)
    while len(chosen) < k:
        apart = apart.minimum((x - x[chosen[-1]]).square().sum(1))
        apart[chosen] = 0.0
        odds = apart if float(apart.sum()) > 0 else torch.ones_like(apart).index_fill_(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
    return torch.tensor(chosen)


def taken(value: Tensor, axis: int, times: int, units: Tensor) -> Tensor:
    """A parameter's row with only some of its hidden units."""
    size = value.shape[axis] // times
    index = torch.cat([units + size * block for block in range(times)]).to(value.device)
    return value.index_select(axis, index)


def inputs_of(rows: Mapping[str, Tensor], units: Mapping[str, tuple[int, int]]) -> Tensor:
    """The incoming weights of each hidden unit, (H, F): of its gate where it has one, which decides whether it is active."""
    axis, times = units["w1"]
    blocks = rows["w1"].movedim(axis, 0).unflatten(0, (times, -1))
    return blocks[0].flatten(1)
