"""Bringing the hidden units of experts into one order before they are averaged.

Hidden units may stand in any order without changing what an expert does, so that a mean of two experts as they stand mixes
units that have nothing to do with each other. Weight matching (Git Re-Basin, Ainsworth et al. 2022,
https://arxiv.org/abs/2209.04836) finds the order of one that is nearest to the other; for the one layer of hidden units
that an expert has, this is one linear assignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Units = Mapping[str, tuple[int, int]]  # parameter -> (axis of hidden units in one expert's row, how many times)


def reordered(value: Tensor, axis: int, times: int, order_H: Tensor) -> Tensor:
    """A parameter's row with its hidden units in another order: unit `order_H[u]` at place u."""
    size = value.shape[axis] // times
    index = torch.cat([order_H + size * block for block in range(times)])
    return value.index_select(axis, index)


@torch.no_grad()
def matching(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], units: Units) -> Tensor:
    """The order (H,) of the other expert's hidden units in which its weights are nearest to the reference's.

    Args:
        reference: one expert's row of each parameter.
        other: another's of the same shapes.
        units: where hidden units lie, see `Expert.units`.
    """
    first, second = (torch.cat([_by_unit(p[name], *units[name]) for name in units], 1) for p in (reference, other))
    # squared distances rather than products, which have the same best order: a unit's own copy is then always the nearest
    worth = 2.0 * first @ second.t() - second.square().sum(1) - first.square().sum(1, keepdim=True)
    return assignment(worth)


def _by_unit(value: Tensor, axis: int, times: int) -> Tensor:
    """All numbers of each hidden unit, (H, F)."""
    blocks = value.detach().double().movedim(axis, 0).unflatten(0, (times, -1))
    return blocks.movedim(0, 1).flatten(1)


@torch.no_grad()
def assignment(worth_NN: Tensor, gap: float = 1e-3) -> Tensor:
    """The column of each row, each column once, with the highest sum of worth.

    Bertsekas's auction (1988) with prices that are refined by and by: rows without a column all bid at once for the one
    they like best, as much as makes the second best as good. The sum is within `gap` times the range of the numbers of the
    highest there is.

    Raises:
        ValueError: the matrix is not square, or holds numbers that are not finite.
    """
    n = worth_NN.shape[0]
    if worth_NN.shape != (n, n) or not worth_NN.isfinite().all():
        raise ValueError(f"assignment: expected a square matrix of finite numbers, got {tuple(worth_NN.shape)}")
    worth = worth_NN.double()
    column_N = torch.arange(n, device=worth.device)
    spread = float(worth.max() - worth.min()) if n else 0.0
    if n < 2 or spread == 0.0:
        return column_N
    price_N = worth.new_zeros(n)
    least = gap * spread / n
    step = max(spread / 4, least)
    while True:
        column_N, price_N = _round(worth, price_N, step)
        if step <= least:
            return column_N
        step = max(step / 5, least)


def _round(worth: Tensor, price_N: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """An auction with bids that rise by at least `step`, from given prices."""
    n, device = len(worth), worth.device
    owner_N = torch.full((n,), -1, dtype=torch.int64, device=device)
    column_N = owner_N.clone()
    while len(free := (column_N < 0).nonzero().squeeze(1)):
        best = (worth.index_select(0, free) - price_N).topk(2, dim=1)
        wanted = best.indices[:, 0]
        bids = price_N.index_select(0, wanted) + best.values[:, 0] - best.values[:, 1] + step
        highest_N = torch.full((n,), -math.inf, dtype=bids.dtype, device=device).scatter_reduce(0, wanted, bids, "amax")
        wins = (bids == highest_N.index_select(0, wanted)).nonzero().squeeze(1)
        # among equal bids the first row's
        winner_N = torch.full_like(owner_N, n).scatter_reduce(
            0, wanted.index_select(0, wins), free.index_select(0, wins), "amin"
        )
        sold = (winner_N < n).nonzero().squeeze(1)
        before, now = owner_N.index_select(0, sold), winner_N.index_select(0, sold)
        column_N.index_fill_(0, before[before >= 0], -1)
        owner_N.index_copy_(0, sold, now)
        column_N.index_copy_(0, now, sold)
        price_N = price_N.index_copy(0, sold, highest_N.index_select(0, sold))
    return column_N, price_N
