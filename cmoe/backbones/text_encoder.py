"""A small bidirectional transformer for classifying short texts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.experts import ExpertLayers
from cmoe.backbones.transformer import Blocks, Packing, embed
from cmoe.config.types import Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.moe import RouteContext


class TextEncoder(Backbone):
    """Transformer encoder over word tokens, mean-pooled; its feed-forward networks become layers of experts.

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

    modalities: ClassVar[tuple[str, ...]] = ("text",)
    attends: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("token_ids", "sequence", "position")

    def __init__(
        self,
        depth: PositiveInt = 2,
        dim: PositiveInt = 128,
        heads: PositiveInt = 4,
        hidden: PositiveInt | None = None,
        dropout: Fraction = 0.1,
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
        self.words = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.positions = nn.Embedding(input_shape[0], dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = Blocks(depth, dim, heads, hidden or 4 * dim, dropout, experts, macaron)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        valid = x != 0
        # texts are short and padded to the longest of the whole stream: cut to the longest of the batch
        length = max(int(valid.sum(1).max()), 1) if x.shape[0] else 1
        x, valid = x[:, :length], valid[:, :length]
        valid = valid | (torch.arange(length, device=x.device) == 0)  # an empty text still attends to something
        packing = Packing(valid)  # two thirds of the places are padding, which costs as much as words
        h = packing.pack(embed(x, self.words, self.positions))
        if isinstance(context.task, Tensor):
            context = replace(context, task=context.task.index_select(0, packing.sequence()))
        if asked := self.asked():
            told = {"token_ids": packing.pack(x), "sequence": packing.sequence(), "position": packing.position()}
            context = replace(context, **{name: told[name] for name in asked})
        h, routings = self.blocks(h, False, context, packing)
        count = valid.sum(1, keepdim=True).to(h.dtype)
        return Features(packing.unpack(self.norm(h)).sum(1) / count, routings)
