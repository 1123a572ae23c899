"""Plain fine-tuning: the lower baseline."""

from __future__ import annotations

from cmoe.strategies.base import Strategy


class Naive(Strategy):
    """Trains on each experience as it comes and does nothing against forgetting."""
