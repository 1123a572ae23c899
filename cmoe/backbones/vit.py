"""timm's Vision Transformer (Dosovitskiy et al. 2021) with experts in its blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.experts import ExpertLayers, select
from cmoe.backbones.pretrained import create
from cmoe.config.types import Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.moe import HeadLayer, MoELayer, MoH, RouteContext, passed_on


class ViT(Backbone):
    """Vision Transformer from timm; the feed-forward networks of its blocks become layers of experts.

    With `moe.attention` its attention's heads become experts too; with `pretrained` those are the trained ones ('moh').

    Options:
        model: timm's name; with `pretrained` the sizes below must stay unset.
        pretrained: load timm's weights (downloaded once, or found in the usual cache).
        patch: side of a patch in pixels.
        depth: number of blocks.
        dim: width of the tokens.
        heads: attention heads.
        dropout: share of features dropped in blocks and projections while training.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    attends: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        pretrained: bool = False,
        patch: PositiveInt | None = None,
        depth: PositiveInt | None = None,
        dim: PositiveInt | None = None,
        heads: PositiveInt | None = None,
        dropout: Fraction = 0.0,
        *,
        input_shape: tuple[int, ...],
        vocabulary: int | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block, VisionTransformer

        channels, height, width = input_shape
        options: dict[str, Any] = {"in_chans": channels, "img_size": (height, width)}
        sizes = {"patch_size": patch, "depth": depth, "embed_dim": dim, "num_heads": heads}
        if pretrained and any(v is not None for v in sizes.values()):
            raise UserError("model.pretrained: expected patch, depth, dim and heads unset, they belong to the weights")
        if not pretrained:
            # small by default: a patch that divides 28 and 32 pixels, 0.46 M parameters
            usual = {"patch_size": 7 if height % 7 == 0 else 4, "depth": 4, "embed_dim": 96, "num_heads": 4}
            options |= {k: usual[k] if v is None else v for k, v in sizes.items()}
            if height % options["patch_size"] or width % options["patch_size"]:
                raise UserError(f"model.patch: expected a divisor of {height} and {width}, got {options['patch_size']}")
            if options["embed_dim"] % options["num_heads"]:
                raise UserError(
                    f"model.heads: expected a divisor of dim {options['embed_dim']}, got {options['num_heads']}"
                )
        self.vit = create(model, "model.model", pretrained, drop_rate=dropout, proj_drop_rate=dropout, **options)
        if not isinstance(self.vit, VisionTransformer) or not all(isinstance(b, Block) for b in self.vit.blocks):
            raise UserError(f"model.model: expected a Vision Transformer of timm, got '{model}'")
        self.width, self.dropout = int(self.vit.num_features), dropout
        by_experts = None if experts is None else experts.attention
        for i in select(by_experts, len(self.vit.blocks)):
            assert by_experts is not None
            attention = self.vit.blocks[i].attn
            layer = by_experts.layer(self.width, attention.head_dim, 0.0)
            if pretrained:
                adopt(attention, layer)
            self.vit.blocks[i].attn = layer
        for i in select(experts, len(self.vit.blocks)):
            assert experts is not None
            mlp = self.vit.blocks[i].mlp
            self.vit.blocks[i].mlp = experts.layer(self.width, mlp.fc1.out_features, instead_of=lambda mlp=mlp: mlp)

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        vit, routings = self.vit, {}
        h = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        for i, block in enumerate(vit.blocks):
            # timm's own block forward cannot hand a routing context to its mlp
            if isinstance(block.attn, HeadLayer):
                y, routing = block.attn(block.norm1(h), context)
                routings[f"vit.blocks.{i}.attn"] = routing
                context = passed_on(context, routing)
                y = F.dropout(y, self.dropout, self.training)
            else:
                y = block.attn(block.norm1(h))
            h = h + block.drop_path1(block.ls1(y))
            if isinstance(block.mlp, MoELayer):
                y, routing = block.mlp(block.norm2(h), context)
                routings[f"vit.blocks.{i}.mlp"] = routing
                context = passed_on(context, routing)
            else:
                y = block.mlp(block.norm2(h))
            h = h + block.drop_path2(block.ls2(y))
        return Features(vit.forward_head(vit.norm(h), pre_logits=True), routings)


def adopt(attention: Any, layer: HeadLayer) -> None:
    """Give a layer the heads of timm's attention.

    Raises:
        UserError: it cannot take them.
    """
    if not isinstance(layer, MoH):
        raise UserError(
            "model.moe.attention.kind: expected 'moh' with pretrained, whose heads are the experts, got 'moa'"
        )
    if not isinstance(attention.q_norm, nn.Identity):
        raise UserError("model.moe.attention: expected a model whose attention has no norm of queries and keys")
    try:
        layer.adopt(attention.qkv, attention.proj, attention.num_heads)
    except ValueError as error:
        raise UserError(f"model.moe.attention.{error}") from error
