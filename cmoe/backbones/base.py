"""What every backbone is: a module from a batch and its routing context to features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from cmoe.moe import MoELayer, RouteContext, Routing


@dataclass(slots=True)
class Features:
    """What a backbone returns.

    Attributes:
        x: features, (B, D) for one vector a sample or (B, L, D) for one a position.
        routings: what each Mixture-of-Experts layer decided, by the layer's name.
    """

    x: Tensor
    routings: dict[str, Routing] = field(default_factory=dict)


class Backbone(nn.Module):
    """Base of all backbones.

    Attributes:
        modalities: kinds of input that it takes.
        causal: no position sees a later one (what language modelling needs).
        gives: what its layers' routers are told beside the task label (fields of `RouteContext`).
        width: size D of the features.
    """

    modalities: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = False
    gives: ClassVar[tuple[str, ...]] = ()
    supplied: ClassVar[tuple[str, ...]] = ("input_shape", "vocabulary", "experts")
    width: int

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        """Features of a batch.

        Args:
            x: (B, ...) as the stream's transform gives it.
            context: task label (an int, or one a sample) and whatever else routers need.
        """
        raise NotImplementedError

    def asked(self) -> set[str]:
        """What its layers' routers need of `gives`."""
        needs = [layer.router.needs for layer in self.moe_layers().values()]
        return set().union(*needs) & set(self.gives)

    def moe_layers(self) -> dict[str, MoELayer]:
        """The Mixture-of-Experts layers by their names, in the order of depth."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoELayer)}
