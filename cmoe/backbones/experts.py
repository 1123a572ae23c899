"""From the `moe:` section of a configuration to layers inside a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from cmoe.errors import UserError
from cmoe.moe import HeadLayer, MoA, MoELayer, MoH
from cmoe.moe.dispatch import Path


@dataclass(frozen=True)
class HeadLayers:
    """Where a backbone gets attention whose heads are experts from.

    Attributes:
        kind: 'moa' or 'moh'.
        heads: heads that the router chooses from.
        router: makes a layer's router from its width `dim`.
        shared: heads that every token uses ('moh').
        size: of a head; None is the backbone's own.
        layers: which blocks, as in `ExpertLayers`.
    """

    kind: Literal["moa", "moh"]
    heads: int
    router: Callable[..., Any]
    shared: int = 0
    size: int | None = None
    layers: str | list[int] = "all"

    def chosen(self, count: int) -> set[int]:
        """Indices of the blocks, among `count`, whose attention has experts; raises as `ExpertLayers.chosen`."""
        return _chosen(self.layers, count, "model.moe.attention.layers")

    def layer(self, dim: int, size: int, dropout: float) -> HeadLayer:
        """Attention of width `dim` with heads of the backbone's `size`.

        Raises:
            UserError: shared heads where there are none.
        """
        options: dict[str, Any] = {"router": self.router, "dropout": dropout}
        if self.kind == "moh":
            return MoH(dim, self.heads, self.size or size, shared=self.shared, **options)
        if self.shared:
            raise UserError(f"model.moe.attention.shared: expected 0 with kind 'moa', got {self.shared}")
        return MoA(dim, self.heads, self.size or size, **options)


@dataclass(frozen=True)
class ExpertLayers:
    """Where a backbone gets its Mixture-of-Experts layers from.

    Attributes:
        experts: experts in each layer at the start.
        router: makes a layer's router from its width `dim`.
        expert: makes a cohort of experts; None is the backbone's own kind.
        hidden: hidden units of one expert; None is the feed-forward network's own.
        layers: 'all', 'last', 'alternate', 'none', or the indices that get experts.
        dispatch: see `cmoe.moe.dispatch`.
        more: further cohorts, as in `MoELayer`.
        shared: experts that work on every token.
        base: 'none', 'frozen' or 'trained': whether the network that was here stays, and the experts add to it.
        distillation: weight of the mutual distillation loss.
        recompute: hidden units are computed again for the backward pass.
        attention: experts where a block's self-attention is; None for ordinary attention.
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
    attention: HeadLayers | None = None

    def chosen(self, count: int) -> set[int]:
        """Indices, among `count` feed-forward networks, that become Mixture-of-Experts layers.

        Raises:
            UserError: an index that the backbone does not have.
        """
        return _chosen(self.layers, count, "model.moe.layers")

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

        Raises:
            UserError: the router, the experts and the options do not go together.
        """
        base = None if self.base == "none" else instead_of().requires_grad_(self.base == "trained")
        own = self.expert or {"name": default, **extra}
        more = [
            {"experts": m["experts"], "expert": m["expert"] or own, "hidden": m["hidden"] or self.hidden or hidden}
            for m in self.more
        ]
        try:
            return MoELayer(
                dim,
                hidden=self.hidden or hidden,
                out_dim=out_dim,
                experts=self.experts,
                expert=own,
                router=self.router,
                dispatch=self.dispatch,
                more=more,
                shared=self.shared,
                base=base,
                distillation=self.distillation,
                recompute=self.recompute,
            )
        except ValueError as error:
            raise UserError(f"model.moe: {error}") from error


def select(experts: ExpertLayers | HeadLayers | None, count: int) -> set[int]:
    """Indices that get experts; none for a dense backbone."""
    return experts.chosen(count) if experts is not None else set()


def _chosen(layers: str | list[int], count: int, key: str) -> set[int]:
    if isinstance(layers, str):
        alternate = set(range(1, count, 2)) or {count - 1}
        return {"all": set(range(count)), "last": {count - 1}, "alternate": alternate, "none": set()}[layers]
    wrong = [i for i in layers if not isinstance(i, int) or not -count <= i < count]
    if wrong or not layers:
        raise UserError(f"{key}: expected indices from 0 to {count - 1}, got {layers}")
    return {int(i) % count for i in layers}
