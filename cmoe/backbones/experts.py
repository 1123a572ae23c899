"""From the `moe:` section of a configuration to layers inside a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from cmoe.errors import UserError
from cmoe.moe import MoELayer
from cmoe.moe.dispatch import Path


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
        more: further cohorts, as in `MoELayer`.
        shared: experts that work on every token.
        base: 'none', 'frozen' or 'trained': whether the network that was here stays, and the experts add to it.
        distillation: weight of the mutual distillation loss.
        recompute: hidden units are computed again for the backward pass.
    """

    experts: int
    router: Callable[..., Any]
    expert: Callable[..., Any] | None = None
    hidden: int | None = None
    layers: str | list[int] = "all"
    dispatch: Path = "auto"
    more: Sequence[Mapping[str, Any]] = ()
    shared: int = 0
    base: Literal["none", "frozen", "trained"] = "none"
    distillation: float = 0.0
    recompute: bool = False

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

    def layer(
        self,
        dim: int,
        hidden: int,
        out_dim: int | None = None,
        *,
        instead_of: Callable[[], nn.Module],
        default: str = "ffn",
        **extra: Any,
    ) -> MoELayer:
        """One layer from `dim` to `out_dim` (default `dim`) features.

        Args:
            dim: input dimension.
            hidden: hidden units of an expert where the configuration says none.
            out_dim: output dimension.
            instead_of: makes the dense network that the layer stands for; asked only where `base` keeps it.
            default: the kind of expert where the configuration says none.
            extra: options of the default kind.
        """
        base = None if self.base == "none" else instead_of().requires_grad_(self.base == "trained")
        own = self.expert or {"name": default, **extra}
        return MoELayer(
            dim,
            hidden=self.hidden or hidden,
            out_dim=out_dim,
            experts=self.experts,
            expert=own,
            router=self.router,
            dispatch=self.dispatch,
            more=[
                {"experts": m["experts"], "expert": m["expert"] or own, "hidden": m["hidden"] or self.hidden or hidden}
                for m in self.more
            ],
            shared=self.shared,
            base=base,
            distillation=self.distillation,
            recompute=self.recompute,
        )


def select(experts: ExpertLayers | None, count: int) -> set[int]:
    """Indices that get experts; none for a dense backbone."""
    return experts.chosen(count) if experts is not None else set()
