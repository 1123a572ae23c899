"""How many tokens an expert takes, and which of those that want it are left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places(factor: float, assignments: int, n: int) -> int:
    """⌈factor · assignments / n⌉, at least 1: tokens that each of `n` experts takes.

    A product that should be whole is not rounded up: 1.1 · 100 / 10 is 11.000000000000002 in float64.
    """
    exact = factor * assignments / max(n, 1)
    return max(1, math.ceil(exact * (1 - 1e-12)))


def over(
    columns_TK: Tensor,
    absent_TK: Tensor | None,
    weights_TK: Tensor,
    n: int,
    each: int,
    drop: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which assignments find no place, (T, K) bool; those that are absent are not among them.

    Args:
        columns_TK: who is wanted.
        absent_TK: True where nobody is.
        weights_TK: decide with `drop` 'weight'.
        n: experts.
        each: places per expert.
        drop: 'order' keeps earlier tokens (and of one token the better choice), 'weight' higher weights (batch
            priority), 'random' any.
        generator: for 'random'.
    """
    size = columns_TK.numel()
    columns_N = columns_TK.reshape(-1)
    if absent_TK is not None:
        columns_N = columns_N.masked_fill(absent_TK.reshape(-1), n)  # a queue of its own
    order_N: Tensor | None = None
    if drop == "weight":
        order_N = weights_TK.detach().reshape(-1).argsort(descending=True, stable=True)
    elif drop == "random":
        order_N = torch.rand(size, device=columns_TK.device, generator=generator).argsort()
    queued_N = columns_N if order_N is None else columns_N.index_select(0, order_N)
    sorted_N, by_expert_N = queued_N.sort(stable=True)
    starts_N = torch.searchsorted(sorted_N, sorted_N)  # where each one's queue begins
    late_N = torch.arange(size, device=columns_TK.device) - starts_N >= each
    late_N &= sorted_N < n
    where_N = by_expert_N if order_N is None else order_N.index_select(0, by_expert_N)
    return torch.zeros_like(late_N).index_copy(0, where_N, late_N).view(columns_TK.shape)
