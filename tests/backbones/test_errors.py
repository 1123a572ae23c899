"""Sizes and names that cannot be are refused in one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from cmoe.backbones import MLP, ByteLM, ConvNet, ExpertLayers, TextEncoder, ViT
from cmoe.errors import UserError
from cmoe.moe.routers import TaskTable

IMAGE = {"input_shape": (1, 8, 8), "vocabulary": None}
TOKENS = {"input_shape": (10,), "vocabulary": 50}
WRONG: list[tuple[type, dict[str, Any], str, str]] = [
    (TextEncoder, {"dim": 10, "heads": 3, **TOKENS}, "model.heads", "divisor of dim 10, got 3"),
    (ByteLM, {"dim": 10, "heads": 4, **TOKENS}, "model.heads", "divisor of dim 10, got 4"),
    (ViT, {"dim": 18, "heads": 4, **IMAGE}, "model.heads", "got 4"),
    (ViT, {"dim": 90, **IMAGE}, "model.heads", "got 4"),  # the default
    (ViT, {"patch": 3, **IMAGE}, "model.patch", "divisor of 8 and 8, got 3"),
    (ViT, {"model": "vit_tiny_patch16_24", **IMAGE}, "model.model", "did you mean 'vit_tiny_patch16_224'"),
    (ViT, {"model": "resnet18", **IMAGE}, "model.model", "resnet18"),
    (ViT, {"model": "convnext_atto", **IMAGE}, "model.model", "convnext_atto"),
    (ViT, {"model": "eva02_tiny_patch14_224", "patch": 4, **IMAGE}, "model.model", "eva02_tiny_patch14_224"),
    (ViT, {"pretrained": True, "depth": 2, **IMAGE}, "model.pretrained", "unset"),
    (ConvNet, {"patch": 1, "depths": [1, 1], **IMAGE}, "model.depths", "four numbers"),
    (ConvNet, {"patch": 1, "dims": [4, 4, 4], **IMAGE}, "model.dims", "four numbers"),
    (ConvNet, {"patch": 1, "model": "convnext_ato", **IMAGE}, "model.model", "did you mean 'convnext_atto'"),
    (ConvNet, {"patch": 1, "model": "resnet18", **IMAGE}, "model.model", "resnet18"),
    (ConvNet, IMAGE, "model.patch", "at most 1 for images of 8x8 pixels"),
    (ConvNet, {"input_shape": (1, 28, 28)}, "model.patch", "expected 3 for images of 28x28"),
    (ConvNet, {"pretrained": True, "patch": 2, **IMAGE}, "model.pretrained", "unset"),
    (MLP, {"experts": ExpertLayers(2, TaskTable, layers=[2]), **IMAGE}, "model.moe.layers", "from 0 to 1"),
    (MLP, {"experts": ExpertLayers(2, TaskTable, layers=[]), **IMAGE}, "model.moe.layers", "from 0 to 1"),
    (ByteLM, {"experts": ExpertLayers(2, TaskTable, layers=[-3]), **TOKENS}, "model.moe.layers", "from 0 to 1"),
]


@pytest.mark.parametrize(("backbone", "options", "key", "says"), WRONG)
def test_what_cannot_be_is_refused_in_one_line(backbone: type, options: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        backbone(**options)
    message = str(refused.value)
    assert key in message
    assert says in message
    assert "\n" not in message
