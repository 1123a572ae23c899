"""A backbone with its head, and the structure that a checkpoint must know to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cmoe.backbones import Backbone
from cmoe.learners.head import Head
from cmoe.moe import MoELayer, RouteContext, Routing, surgery
from cmoe.moe.surgery.place import Routers


@dataclass(slots=True)
class Output:
    """What a model returns.

    Attributes:
        logits: (B, U), or (B, L, U) for a sequence.
        features: what the head saw, (B, D) or (B, L, D).
        routings: what each Mixture-of-Experts layer decided, by the layer's name.
    """

    logits: Tensor
    features: Tensor
    routings: dict[str, Routing]

    def auxiliary(self) -> dict[str, Tensor]:
        """The routers' auxiliary losses by name, already weighted; summed over layers."""
        total: dict[str, Tensor] = {}
        for routing in self.routings.values():
            for name, value in routing.aux.items():
                total[name] = total[name] + value if name in total else value
        return total


class Model(nn.Module):
    """Backbone and head.

    Args:
        backbone: features of a batch.
        head: logits of features.
        routers: makes what a router's name and options mean, for layers that come while training; default are the
            built-in ones.
    """

    def __init__(self, backbone: Backbone, head: Head, routers: Routers | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.routers = backbone, head, routers

    def forward(self, x: Tensor, context: RouteContext) -> Output:
        """Logits of a batch, see `Output`."""
        features = self.backbone(x, context)
        return Output(self.head(features.x), features.x, features.routings)

    def moe_layers(self) -> dict[str, MoELayer]:
        """The Mixture-of-Experts layers by their names, in the order of depth."""
        return self.backbone.moe_layers()

    def needs_task(self) -> bool:
        """Whether a router cannot work without the task label."""
        return any("task" in layer.router.needs for layer in self.moe_layers().values())

    def structure(self) -> dict[str, Any]:
        """Plain containers: everything about the shape that training may have changed."""
        return {
            "head": self.head.structure(),
            "placed": surgery.placed(self.backbone),
            "moe": {name: layer.structure() for name, layer in self.moe_layers().items()},
            "frozen": [name for name, p in self.named_parameters() if not p.requires_grad],
        }

    def restore_structure(self, structure: dict[str, Any]) -> None:
        """The shape as it was when `structure()` was taken; the weights follow by `load_state_dict`."""
        surgery.put(self.backbone, structure.get("placed", {}), self.routers)
        self.head.restore_structure(structure["head"])
        for name, layer in self.moe_layers().items():
            layer.restore_structure(structure["moe"][name])
        frozen = set(structure["frozen"])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters in all, and active for one sample of one task (what routing leaves out is not active)."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for layer in self.moe_layers().values():
            layer_total, layer_active = layer.parameter_counts()
            idle += layer_total - layer_active
        if self.head.kind == "multi" and self.head.blocks:
            sizes = [sum(p.numel() for p in block.parameters()) for block in self.head.blocks]
            idle += sum(sizes) - max(sizes)
        return total, total - idle
