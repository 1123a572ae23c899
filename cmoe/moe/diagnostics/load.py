"""Load: how the tokens spread over experts, as counts by expert id."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from cmoe.moe.routing import Routing
from cmoe.moe.view import NONE


def load(routing: Routing) -> dict[int, int]:
    """Tokens of each expert by id; visible experts without any have 0."""
    counts = dict.fromkeys(routing.columns, 0)
    ids, amounts = routing.ids.unique(return_counts=True)
    for expert, amount in zip(ids.tolist(), amounts.tolist(), strict=True):
        if expert != NONE:
            counts[expert] = amount
    return counts


def add_loads(loads: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The loads of several batches together."""
    total: dict[int, int] = {}
    for one in loads:
        for expert, amount in one.items():
            total[expert] = total.get(expert, 0) + amount
    return total


def max_over_mean(counts: Mapping[int, int]) -> float:
    """Load of the busiest expert over the mean load: 1 when balanced; nan without any tokens."""
    total = sum(counts.values())
    return max(counts.values()) * len(counts) / total if total else float("nan")


def load_cv(counts: Mapping[int, int]) -> float:
    """Coefficient of variation, population standard deviation over mean: 0 when balanced, √(E−1) when one expert does
    everything; nan without any tokens.

    The square root of what Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538) hold down.
    """
    total = sum(counts.values())
    if not total:
        return float("nan")
    mean = total / len(counts)
    return math.sqrt(sum((amount - mean) ** 2 for amount in counts.values()) / len(counts)) / mean


def dead(counts: Mapping[int, int]) -> list[int]:
    """Ids of experts that no token went to."""
    return sorted(expert for expert, amount in counts.items() if not amount)


def load_entropy(counts: Mapping[int, int]) -> float:
    """Entropy in nats of the load's shares: log(E) when balanced, 0 when one expert does everything; nan when empty."""
    total = sum(counts.values())
    if not total:
        return float("nan")
    shares = torch.tensor([amount / total for amount in counts.values() if amount], dtype=torch.float64)
    return float(-(shares * shares.log()).sum())
