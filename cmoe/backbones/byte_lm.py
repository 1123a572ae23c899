"""A small decoder over bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.experts import ExpertLayers
from cmoe.backbones.transformer import Blocks, embed
from cmoe.config.types import Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.moe import RouteContext

PADDING = 256  # the token that fills up the end of a text


class ByteLM(Backbone):
    """Causal transformer over bytes; its feed-forward networks become layers of experts.

    With `moe.attention` its attention's heads become experts too.

    Options:
        depth: number of blocks.
        dim: width of the tokens.
        heads: attention heads.
        hidden: units of a feed-forward network; default is 4 · dim.
        dropout: share of features dropped while training.
        macaron: a feed-forward network before attention too, and half steps for both (Lu et al. 2019); `moe.layers`
            counts both, so that 'alternate' gives experts to those after attention.
    """

    modalities: ClassVar[tuple[str, ...]] = ("bytes",)
    causal: ClassVar[bool] = True
    attends: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("token_ids", "sequence", "position")

    def __init__(
        self,
        depth: PositiveInt = 2,
        dim: PositiveInt = 128,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        dropout: Fraction = 0.0,
        macaron: bool = False,
        *,
        input_shape: tuple[int, ...],
        vocabulary: int | None,
        experts: ExpertLayers | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"model.heads: expected a divisor of dim {dim}, got {heads}")
        assert vocabulary is not None
        self.width = dim
        self.bytes = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(input_shape[0], dim)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = Blocks(depth, dim, heads, hidden or 4 * dim, dropout, experts, macaron)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        h = embed(x, self.bytes, self.positions)
        valid = x != PADDING
        if not valid.all():  # the end of a text: padding is no token to a router
            context = replace(context, valid=valid)
        if asked := self.asked():
            places = torch.arange(x.shape[1], device=x.device).expand_as(x)
            told = {"token_ids": x, "sequence": torch.arange(x.shape[0], device=x.device), "position": places}
            context = replace(context, **{name: told[name] for name in asked})
        h, routings = self.blocks(h, True, context)
        return Features(self.norm(h), routings)
