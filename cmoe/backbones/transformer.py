"""The pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020) that the text backbones share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.backbones.experts import ExpertLayers, select
from cmoe.moe import HeadLayer, MoELayer, RouteContext, Routing, passed_on


class Packing:
    """Where the tokens of texts of different lengths are, so that only attention sees the padding.

    Attributes:
        rows: (N,) index of each valid token among the B · L places.
        mask: (B, 1, 1, L) the places that may be attended to.

    Args:
        valid: (B, L) bool.
    """

    def __init__(self, valid: Tensor) -> None:
        self.shape = valid.shape
        self.rows = valid.reshape(-1).nonzero().squeeze(1)
        self.mask = valid[:, None, None, :]

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) without padding, (N, ...)."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, D) with zeros for padding, (B, L, D)."""
        b, n = self.shape
        return x.new_zeros(b * n, x.shape[1]).index_copy(0, self.rows, x).view(b, n, x.shape[1])

    def sequence(self) -> Tensor:
        """(N,) the text that each token belongs to."""
        return self.rows.div(self.shape[1], rounding_mode="floor")

    def position(self) -> Tensor:
        """(N,) the place of each token in its text."""
        return self.rows % self.shape[1]


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, D), or over packed tokens (N, D)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, causal: bool, packing: Packing | None) -> Tensor:
        h, mask = self.qkv(x), None
        if packing is not None:
            h, mask = packing.unpack(h), packing.mask
        b, n, d = h.shape[0], h.shape[1], x.shape[-1]
        q, k, v = h.view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal)
        h = h.transpose(1, 2).reshape(b, n, d)
        return self.out(h if packing is None else packing.pack(h))


class FeedForward(nn.Module):
    """The dense feed-forward network that a layer of experts stands in for."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and a feed-forward network or layer of experts, each on the normed input of its residual.

    A macaron block (Lu et al. 2019, https://arxiv.org/abs/1906.02762) has a feed-forward network before attention too,
    and adds half of what each of the two gives.

    Args:
        dim: width of the tokens.
        attention: what tokens see each other by.
        ffn: what comes after attention.
        dropout: share of features dropped while training.
        before: what comes before attention in a macaron block.
    """

    def __init__(
        self,
        dim: int,
        attention: SelfAttention | HeadLayer,
        ffn: nn.Module,
        dropout: float,
        before: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.macaron, self.dropout = before is not None, dropout
        if before is not None:
            self.norm0, self.mlp0 = nn.LayerNorm(dim), before
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention
        self.mlp = ffn

    def forward(
        self, x: Tensor, causal: bool, context: RouteContext, packing: Packing | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """The tokens, and what the block's layers of experts decided, by the layer's name in the block."""
        decided: dict[str, Routing] = {}
        if self.macaron:
            x = self._feed(x, self.norm0, self.mlp0, "mlp0", context, decided)
            context = _told(context, decided)
        if isinstance(self.attention, HeadLayer):
            y, decided["attention"] = self.attention(self.norm1(x), context, causal, packing)
            context = passed_on(context, decided["attention"])
        else:
            y = self.attention(self.norm1(x), causal, packing)
        x = x + F.dropout(y, self.dropout, self.training)
        return self._feed(x, self.norm2, self.mlp, "mlp", context, decided), decided

    def _feed(
        self, x: Tensor, norm: nn.Module, mlp: nn.Module, name: str, context: RouteContext, decided: dict[str, Routing]
    ) -> Tensor:
        if isinstance(mlp, MoELayer):
            y, decided[name] = mlp(norm(x), context)
        else:
            y = mlp(norm(x))
        y = F.dropout(y, self.dropout, self.training)
        return torch.add(x, y, alpha=0.5 if self.macaron else 1.0)


def _told(context: RouteContext, decided: dict[str, Routing]) -> RouteContext:
    """The context for the layers that come after these."""
    for routing in decided.values():
        context = passed_on(context, routing)
    return context


class Blocks(nn.ModuleList):
    """Blocks one after the other.

    Args:
        depth: how many.
        dim: width of the tokens.
        heads: attention heads.
        hidden: units of a dense feed-forward network.
        dropout: share of features dropped while training.
        experts: what makes layers of experts of the feed-forward networks that it chooses, counted in the order of
            depth, and of the attention that it chooses.
        macaron: whether each block has a feed-forward network before attention too.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        hidden: int,
        dropout: float,
        experts: ExpertLayers | None,
        macaron: bool = False,
    ) -> None:
        super().__init__()
        each = 2 if macaron else 1
        chosen = select(experts, depth * each)

        def ffn(place: int) -> nn.Module:
            if experts is not None and place in chosen:
                return experts.layer(dim, hidden, instead_of=lambda: FeedForward(dim, hidden))
            return FeedForward(dim, hidden)

        by_experts = None if experts is None else experts.attention
        with_experts = select(by_experts, depth)

        def attention(place: int) -> SelfAttention | HeadLayer:
            if by_experts is not None and place in with_experts:
                return by_experts.layer(dim, dim // heads, dropout)
            return SelfAttention(dim, heads, dropout)

        for i in range(depth):
            before = ffn(2 * i) if macaron else None
            after = ffn(each * (i + 1) - 1)
            self.append(Block(dim, attention(i), after, dropout, before))

    def forward(
        self, x: Tensor, causal: bool, context: RouteContext, packing: Packing | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """The tokens through all blocks, and what each layer of experts decided, by its name in the backbone."""
        routings: dict[str, Routing] = {}
        for i, block in enumerate(self):
            x, decided = block(x, causal, context, packing)
            routings.update({f"blocks.{i}.{place}": routing for place, routing in decided.items()})
            context = _told(context, decided)
        return x, routings


def embed(tokens: Tensor, words: nn.Embedding, positions: nn.Embedding) -> Tensor:
    """Sum of word and position embeddings, (B, L, D)."""
    return words(tokens) + positions(torch.arange(tokens.shape[1], device=tokens.device))
