"""What the routings of many batches come to: load, entropy, dropped assignments, tokens nobody served, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cmoe.moe.diagnostics.load import add_loads
from cmoe.moe.losses import entropy_loss
from cmoe.moe.routing import Routing
from cmoe.moe.view import NONE

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer


@dataclass
class Flow:
    """Sums over batches of one layer; `+` joins two.

    Attributes:
        load: tokens that went to each expert, by id; experts without any are not there.
        tokens: how many there were, without padding.
        unserved: how many of them no expert worked on.
        scored: how many of them had scores.
        entropy: sum in nats of the scored tokens' entropies over visible experts.
        dropped: assignments lost to capacity; None where no router had one.
    """

    load: dict[int, int] = field(default_factory=dict)
    tokens: int = 0
    unserved: int = 0
    scored: int = 0
    entropy: float = 0.0
    dropped: int | None = None

    @classmethod
    def of(cls, routing: Routing, entropy: bool = True) -> Flow:
        """One batch.

        Args:
            routing: a layer's.
            entropy: whether that is measured too.

        Raises:
            ValueError: the routing is not made of assignments.
        """
        if routing.kind != "sparse":
            raise ValueError(f"routing: expected kind 'sparse', got {routing.kind!r}")
        served_T = (routing.ids != NONE).any(1)
        valid_T = torch.ones_like(served_T) if routing.valid is None else routing.valid
        ids, amounts = routing.ids.unique(return_counts=True)
        load = {e: n for e, n in zip(ids.tolist(), amounts.tolist(), strict=True) if e != NONE}
        flow = cls(load, int(valid_T.sum()), int((valid_T & ~served_T).sum()))
        if entropy and routing.logits is not None:
            flow.scored = flow.tokens
            flow.entropy = float(entropy_loss(routing.logits.detach().double(), valid_T)) * flow.tokens
        if routing.dropped is not None:
            flow.dropped = int(routing.dropped.sum())
        return flow

    def __add__(self, other: Flow) -> Flow:
        known = [d for d in (self.dropped, other.dropped) if d is not None]
        return Flow(
            add_loads([self.load, other.load]),
            self.tokens + other.tokens,
            self.unserved + other.unserved,
            self.scored + other.scored,
            self.entropy + other.entropy,
            sum(known) if known else None,
        )

    @property
    def mean_entropy(self) -> float | None:
        """Of a scored token, in nats; None where no token had scores."""
        return self.entropy / self.scored if self.scored else None

    @property
    def dropped_share(self) -> float | None:
        """Of the assignments that the router wanted; None without a capacity, or without any assignment."""
        wanted = sum(self.load.values()) + (self.dropped or 0)
        return None if self.dropped is None or not wanted else self.dropped / wanted

    @property
    def unserved_share(self) -> float | None:
        """Of the tokens; None without any."""
        return self.unserved / self.tokens if self.tokens else None


def router_entropy(routing: Routing) -> float | None:
    """Mean entropy in nats of the tokens' distributions over visible experts; None for a router without scores."""
    if routing.logits is None:
        return None
    valid = (routing.ids != NONE).any(1) if routing.valid is None else routing.valid
    return float(entropy_loss(routing.logits.detach().double(), valid))


def flops_per_token(layer: MoELayer) -> int:
    """Floating point operations of a forward pass on one token: matrix products of the router, of what works on every
    token, and of its experts; among experts of different sizes the largest."""
    return layer.flops_per_token()


def active_flops(layer: MoELayer, load: Mapping[int, int], tokens: int) -> float:
    """The same as measured: of the experts that really worked on `tokens` tokens; nan for none.

    Args:
        layer: whose experts they are.
        load: tokens that went to each expert, by id.
        tokens: how many there were, without padding.
    """
    if not tokens:
        return float("nan")
    done = sum(n * layer.cohorts[layer.view.where[e][0]].flops_per_token() for e, n in load.items())
    return layer.flops_for_all() + done / tokens
