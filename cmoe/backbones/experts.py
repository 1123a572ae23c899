"""From the `moe:` section of a configuration to layers inside a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cmoe.errors import UserError
from cmoe.moe import MoELayer


@dataclass(frozen=True)
class ExpertLayers:
    """Where a backbone gets its Mixture-of-Experts layers from.

    Attributes:
        experts: experts in each layer at the start.
        router: makes a layer's router from its width `dim`.
        expert: makes a cohort of experts; None is the backbone's own kind.
        hidden: hidden units of one expert; None is the feed-forward network's own.
        layers: 'all', 'last', 'alternate', or the indices that get experts.
        dispatch: see `cmoe.moe.dispatch`.
    """

    experts: int
    router: Callable[..., Any]
    expert: Callable[..., Any] | None = None
    hidden: int | None = None
    layers: str | list[int] = "all"
    dispatch: Literal["auto", "grouped", "loop", "bmm"] = "auto"

    def chosen(self, count: int) -> set[int]:
        """Indices, among `count` feed-forward networks, that become Mixture-of-Experts layers.

        Raises:
            UserError: an index that the backbone does not have.
        """
        if self.layers == "all":
            return set(range(count))
        if self.layers == "last":
            return {count - 1}
        if self.layers == "alternate":
            return set(range(1, count, 2)) or {count - 1}
        wrong = [i for i in self.layers if not isinstance(i, int) or not -count <= i < count]
        if wrong or not self.layers:
            raise UserError(f"model.moe.layers: expected indices from 0 to {count - 1}, got {self.layers}")
        return {int(i) % count for i in self.layers}

    def layer(self, dim: int, hidden: int, out_dim: int | None = None, default: str = "ffn", **extra: Any) -> MoELayer:
        """One layer from `dim` to `out_dim` (default `dim`) features; `extra` are options of the default expert."""
        return MoELayer(
            dim,
            hidden=self.hidden or hidden,
            out_dim=out_dim,
            experts=self.experts,
            expert=self.expert or {"name": default, **extra},
            router=self.router,
            dispatch=self.dispatch,
        )


def select(experts: ExpertLayers | None, count: int) -> set[int]:
    """Indices that get experts; none for a dense backbone."""
    return experts.chosen(count) if experts is not None else set()
