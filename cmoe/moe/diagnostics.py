"""What a routing or a layer looks like from outside: load, balance, entropy, dead experts, cost per token.

Functions of a `Routing` read it after the fact (they wait for the device); nothing here is part of a training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from cmoe.moe.losses import entropy_loss
from cmoe.moe.routing import Routing
from cmoe.moe.view import NONE

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer


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


def router_entropy(routing: Routing) -> float | None:
    """Mean entropy in nats of the tokens' distributions over visible experts; None for a router without scores."""
    if routing.logits is None:
        return None
    valid = (routing.ids != NONE).any(1)
    return float(entropy_loss(routing.logits.detach().double(), valid))


def flops_per_token(layer: MoELayer) -> int:
    """Floating point operations of a forward pass on one token: matrix products of its experts and of the router."""
    one = max(cohort.flops_per_token() for cohort in layer.cohorts.values())
    router = sum(2 * parameter.numel() for parameter in layer.router.parameters())
    return router + one * layer.router.experts_per_token(layer.view)
