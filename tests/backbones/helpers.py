"""Every backbone, small, in each of its forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmoe.backbones import MLP, Backbone, ByteLM, ConvNet, ExpertLayers, TextEncoder, ViT
from cmoe.moe import RouteContext
from cmoe.moe.routers import TaskTable, TopK

SIZES: dict[str, tuple[type[Backbone], dict[str, Any], tuple[int, ...], int | None]] = {
    "mlp": (MLP, {"hidden": [12, 10]}, (1, 8, 8), None),
    "vit": (ViT, {"patch": 4, "depth": 2, "dim": 16, "heads": 2}, (1, 8, 8), None),
    "convnet": (ConvNet, {"patch": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 8]}, (3, 8, 8), None),
    "text_encoder": (TextEncoder, {"depth": 2, "dim": 16, "heads": 2, "hidden": 24, "dropout": 0.0}, (10,), 50),
    "byte_lm": (ByteLM, {"depth": 2, "dim": 16, "heads": 2, "hidden": 24}, (12,), 258),
}
for text in ("text_encoder", "byte_lm"):
    SIZES[f"{text}_macaron"] = (SIZES[text][0], {**SIZES[text][1], "macaron": True}, *SIZES[text][2:])
NAMES = sorted(SIZES)
ENCODERS = [name for name in NAMES if SIZES[name][0] is TextEncoder]
DECODERS = [name for name in NAMES if SIZES[name][0].causal]
KINDS = ("dense", "topk", "task_table")


def layers(kind: str, experts: int = 3) -> ExpertLayers | None:
    """Where the layers of experts come from; None for a dense backbone."""
    if kind == "dense":
        return None
    return ExpertLayers(experts, (lambda dim: TopK(dim, k=2)) if kind == "topk" else TaskTable)


def build(name: str, kind: str, seed: int = 0, experts: int = 3, **options: Any) -> Backbone:
    made, sizes, shape, vocabulary = SIZES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = made(**{**sizes, **options}, input_shape=shape, vocabulary=vocabulary, experts=layers(kind, experts))
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if key.endswith("gamma"):  # ConvNeXt begins with 1e-6 here: no test would see what its experts do
                parameter.fill_(0.7)
    return backbone


def inputs(name: str, batch: int, seed: int = 1) -> Tensor:
    _, _, shape, vocabulary = SIZES[name]
    generator = torch.Generator().manual_seed(seed)
    if vocabulary is None:
        return torch.rand(batch, *shape, generator=generator)
    return torch.randint(1, vocabulary, (batch, *shape), generator=generator)


def context(kind: str, batch: int, training: bool = False) -> RouteContext:
    """Task labels 0, 1, 2 in turn where they are needed."""
    return RouteContext(task=torch.arange(batch) % 3 if kind == "task_table" else None, training=training)
