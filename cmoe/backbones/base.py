"""What every backbone is: a module from a batch and its routing context to features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from cmoe.moe import MoELayer, RouteContext, Routing
from cmoe.moe.surgery import Dense


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
        attends: whether its attention can have experts (`moe.attention`).
        unit: dimensions between a sample's and D at its layers of experts, as in `Expert.inner`: 0 tokens, 2 feature maps.
        gives: what its layers' routers are told beside the task label (fields of `RouteContext`).
        width: size D of the features.
    """

    modalities: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    unit: ClassVar[int] = 0
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

    def dense_places(self) -> dict[str, str | None]:
        """The dense networks that layers of experts can stand for (`cmoe.moe.surgery.upcycle`), in the order of depth.

        Name -> the activation that the backbone itself applies to what is there; None where it is a whole network. By
        default all modules called `mlp` or `mlp0`, and dense networks that were layers of experts before.
        """
        return {
            name: None
            for name, module in self.named_modules()
            if isinstance(module, Dense)
            or (name.rpartition(".")[2] in ("mlp", "mlp0") and not isinstance(module, MoELayer))
        }

    def moe_layers(self) -> dict[str, MoELayer]:
        """The Mixture-of-Experts layers by their names, in the order of depth."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoELayer)}
