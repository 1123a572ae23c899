"""A dense model gets experts on the way."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from cmoe.config.types import NonNegative, PositiveInt, RouterSpec
from cmoe.errors import UserError
from cmoe.moe import surgery
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.strategies.look import total_experts


class Upcycle(Strategy):
    """Makes experts of a dense model's feed-forward networks once the first experiences are learned (Komatsuzaki et al.
    2022).

    Each expert is a copy of the network, so that the model computes the same at that moment where the router's weights sum
    to 1. Other strategies that follow in the list find the experts there: `[upcycle, expand]`.

    Options:
        after: experiences that the dense model learns first.
        experts: experts in each layer.
        router: how tokens choose experts; default is 'topk', with `split` all experts with weights that are equal at first.
        layers: 'all', 'last', 'alternate', or the indices of the feed-forward networks that become experts.
        noise: added to each copy: N(0, 1) times this, times the standard deviation of each parameter's values.
        split: divide the network's hidden units among the experts instead of copying it (MoEfication, Zhang et al. 2021).
    """

    needs_boundaries: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    def __init__(
        self,
        after: PositiveInt = 1,
        experts: PositiveInt = 4,
        router: RouterSpec | None = None,
        layers: Literal["all", "last", "alternate"] | list[int] = "all",
        noise: NonNegative = 0.0,
        split: bool = False,
    ) -> None:
        self.after, self.experts, self.router, self.layers = after, experts, router, layers
        self.noise, self.split = noise, split

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.model.moe_layers():
            raise UserError("strategy.upcycle: expected a dense model, got one with experts; leave model.moe out")
        known = surgery.dense_networks(context.model)
        names = self._chosen(list(known))
        if self.split:
            for name in names:
                hidden = known[name].hidden
                if hidden is None or hidden % self.experts:
                    raise UserError(
                        f"strategy.upcycle.experts: expected a divisor of the {hidden or 0} hidden units of {name} with "
                        f"split, got {self.experts}"
                    )

    def _chosen(self, names: list[str]) -> list[str]:
        count = len(names)
        if not count:
            raise UserError("strategy.upcycle: expected a model with feed-forward networks, found none")
        if isinstance(self.layers, str):
            alternate = names[1::2] or names[-1:]
            return {"all": names, "last": names[-1:], "alternate": alternate}[self.layers]
        if not self.layers or any(not -count <= i < count for i in self.layers):
            raise UserError(f"strategy.upcycle.layers: expected indices from 0 to {count - 1}, got {self.layers}")
        return [names[i] for i in sorted({i % count for i in self.layers})]

    def before_experience(self, segment: Segment) -> None:
        context = self.context
        if segment.number != self.after:
            return
        done = surgery.upcycle(
            context.model,
            self.experts,
            self.router,
            where=self._chosen(list(surgery.dense_networks(context.model))),
            noise=self.noise,
            split=self.split,
            seeded=lambda name: context.seeded(f"upcycle {name}"),
            generator=torch.Generator().manual_seed(context.seed("upcycle split")),
        )
        context.record(done, segment.last)

    def facts(self) -> dict[str, float]:
        return total_experts(self.context)
