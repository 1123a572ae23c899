"""The multilayer perceptron of the small published protocols."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.experts import ExpertLayers, select
from cmoe.config.types import Fraction, PositiveInt
from cmoe.moe import MoELayer, RouteContext, passed_on


class MLP(Backbone):
    """Multilayer perceptron with ReLU; a hidden layer becomes a layer of experts.

    Options:
        hidden: units of each hidden layer.
        init: 'torch' (nn.Linear's own) or 'xavier' (Glorot uniform weights, torch's biases).
        dropout: share of hidden units dropped while training.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "vector")

    def __init__(
        self,
        hidden: list[PositiveInt] | None = None,
        init: Literal["torch", "xavier"] = "torch",
        dropout: Fraction = 0.0,
        *,
        input_shape: tuple[int, ...],
        vocabulary: int | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        super().__init__()
        sizes = [100, 100] if hidden is None else hidden
        self.width = sizes[-1] if sizes else math.prod(input_shape)
        chosen = select(experts, len(sizes))
        draw = "xavier" if init == "xavier" else "uniform"  # experts as the layers that they stand for
        self.layers = nn.ModuleList()
        before = math.prod(input_shape)
        for i, size in enumerate(sizes):
            if experts is not None and i in chosen:
                self.layers.append(
                    experts.layer(
                        before,
                        size,
                        size,
                        instead_of=lambda a=before, b=size: nn.Sequential(nn.Linear(a, b), nn.ReLU()),
                        default="linear",
                        activation="relu",
                        init=draw,
                    )
                )
            else:
                self.layers.append(nn.Linear(before, size))
            before = size
        self.dropout = dropout
        if init == "xavier":
            self.apply(glorot)

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        h, routings = x.flatten(1), {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, MoELayer):
                h, routing = layer(h, context)
                routings[f"layers.{i}"] = routing
                context = passed_on(context, routing)
            else:
                h = F.relu(layer(h)) if isinstance(layer, nn.Linear) else layer(h)
            if self.dropout:
                h = F.dropout(h, self.dropout, self.training)
        return Features(h, routings)

    def dense_places(self) -> dict[str, str | None]:
        linear = {f"layers.{i}": "relu" for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear)}
        return {**super().dense_places(), **linear}


def glorot(module: nn.Module) -> None:
    """Glorot & Bengio (2010) uniform weights for the linear layers of `module`; biases stay."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
