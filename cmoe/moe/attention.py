"""Attention whose heads are experts: each token chooses the heads that it asks with.

MoA: Zhang et al. 2022, https://arxiv.org/abs/2210.05144. MoH: Jin et al. 2024, https://arxiv.org/abs/2410.11842.

Both are layers of experts like any other: heads have ids for life, lie in cohorts with router columns of their own, and
are added, frozen, removed and assigned to tasks. Shape suffixes beside those of `cmoe.moe.routing`: B sequences, L
places, S size of a head.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe.dispatch import Path, Sorted, on_host
from cmoe.moe.experts import Expert, Linear
from cmoe.moe.experts.base import LinearMap, init_linear
from cmoe.moe.kinds import Spec
from cmoe.moe.layer import MoELayer
from cmoe.moe.processes import distributed
from cmoe.moe.routing import RouteContext, Routing, UniformRouting, score_dtype


class Layout(Protocol):
    """Where packed tokens (N, ...) are among the places (B, L) of their sequences.

    Attributes:
        mask: (B, 1, 1, L) bool, the places that may be attended to.
    """

    mask: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) without padding, (N, ...)."""
        ...

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) with zeros for padding, (B, L, ...)."""
        ...


class Heads(Expert):
    """A cohort of attention heads with queries and outputs of their own; keys and values are the layer's.

    Submodules: `q` (E, D, S) and `o` (E, S, O), stacked linear maps; `hidden` is the size S of a head.

    Args:
        bias: whether queries have a bias.
        init: see `init_linear`.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        bias: bool = True,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
    ) -> None:
        assert hidden is not None
        super().__init__(n, dim, hidden, out_dim)
        self.q = Linear(n, dim, None, hidden, activation="none", init=init, bias=bias)
        self.o = Linear(n, hidden, None, out_dim, activation="none", init=init, bias=False)

    def maps(self) -> tuple[Linear, ...]:
        """The linear maps that only a token's own heads compute."""
        return self.q, self.o

    def stacked(self) -> tuple[Tensor | None, ...]:
        return tuple(p for part in self.maps() for p in part.stacked())

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        raise ValueError("attention heads work on sequences: they can only be in a layer MoA or MoH")

    def reset_parameters(self) -> None:
        for part in self.maps():
            part.reset_parameters()

    def zero_output(self) -> None:
        self.o.zero_output()


class KeyedHeads(Heads):
    """A cohort of attention heads with keys and values of their own: the heads of ordinary attention.

    Submodules: `q`, `k`, `v` (E, D, S), `o` (E, S, O). Outputs begin as those of one linear map from all heads, as wide
    together as the input.
    """

    paths: ClassVar[tuple[str, ...]] = ("dense",)

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        bias: bool = True,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
    ) -> None:
        super().__init__(n, dim, hidden, out_dim, bias, init)
        self.k = Linear(n, dim, None, self.q.out_dim, activation="none", init=init, bias=bias)
        self.v = Linear(n, dim, None, self.q.out_dim, activation="none", init=init, bias=bias)

    def keyed(self) -> tuple[Linear, Linear]:
        """The linear maps that every token goes through, whichever heads it asks with."""
        return self.k, self.v

    def reset_parameters(self) -> None:
        for part in (self.q, *self.keyed()):
            part.reset_parameters()
        init_linear(self.o.w, None, self.o.init, fan_in=self.dim)

    def weighted(self, x_TD: Tensor, weights_TE: Tensor, places: Places) -> Tensor:
        """All heads on all tokens, their outputs added up by weight, (T, O)."""
        q, k, v = (places.sequences(part.every(x_TD).transpose(0, 1)) for part in (self.q, *self.keyed()))
        h_TES = places.tokens(places.attend(q, k, v))
        h_TES = h_TES * weights_TE.unsqueeze(2).to(h_TES.dtype)
        return h_TES.flatten(1) @ self.o.w.flatten(0, 1).to(h_TES.dtype)


class Places:
    """From tokens to the places of their sequences and back, and attention among them.

    Args:
        shape: (B, L) of tokens that are not packed.
        layout: where packed tokens are.
        valid: (T,) bool, padding among tokens that are not packed; nobody attends to it.
        causal: no place attends to a later one; padding must then come last.
        dropout: share of attention weights that is dropped.
    """

    def __init__(
        self, shape: tuple[int, ...], layout: Layout | None, valid: Tensor | None, causal: bool, dropout: float
    ) -> None:
        self.shape, self.layout, self.causal, self.dropout = shape, layout, causal, dropout
        self.mask: Tensor | None = None
        if layout is not None:
            self.mask = layout.mask
        elif valid is not None and not causal:
            mask = valid.view(shape[0], 1, 1, shape[1])
            self.mask = mask | ~mask.any(3, keepdim=True)  # a sequence of padding attends to all of it, not to nothing

    def sequences(self, x_THS: Tensor) -> Tensor:
        """(T, heads, S) to (B, heads, L, S)."""
        if self.layout is None:
            return x_THS.reshape(*self.shape, *x_THS.shape[1:]).transpose(1, 2)
        return self.layout.unpack(x_THS.flatten(1)).unflatten(2, x_THS.shape[1:]).transpose(1, 2)

    def tokens(self, x_BHLS: Tensor) -> Tensor:
        """(B, heads, L, S) to (T, heads, S)."""
        x_BLHS = x_BHLS.transpose(1, 2)
        return x_BLHS.flatten(0, 1) if self.layout is None else self.layout.pack(x_BLHS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scaled dot-product attention (Vaswani et al. 2017), all (B, heads, L, S)."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, dropout_p=self.dropout, is_causal=self.causal
        )


class HeadLayer(MoELayer):
    """The base of `MoA` and `MoH`: a layer of experts that stands where self-attention is.

    Args:
        dim: width D of the tokens.
        heads: heads that the router chooses from.
        size: of a head; None is D / heads.
        router: as in `MoELayer`.
        dispatch: as in `MoELayer`.
        dropout: share of attention weights dropped while training.
        bias: whether queries, keys and values have a bias.
        init: of the heads: 'uniform' (as nn.Linear), 'xavier' or 'normal' (standard deviation 0.02).

    Raises:
        ValueError: a name or option is unknown or out of range.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        size: int | None = None,
        *,
        router: Spec = "topk",
        dispatch: Path = "auto",
        dropout: float = 0.0,
        bias: bool = True,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
    ) -> None:
        if size is None and dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, or a size, got {heads}")
        expert = {"name": self.kind, "bias": bias, "init": init}
        super().__init__(dim, size or dim // heads, experts=heads, expert=expert, router=router, dispatch=dispatch)
        if self.router.routing_kind != "sparse":
            name = type(self.router).__name__
            raise ValueError(f"router: expected one that assigns tokens to heads, got {name}, which mixes or merges")
        self.dropout = dropout

    def forward(
        self, x: Tensor, context: RouteContext | None = None, causal: bool = False, layout: Layout | None = None
    ) -> tuple[Tensor, Routing]:
        """Self-attention with the heads that the router chooses for each token.

        Args:
            x: (B, L, D), or packed tokens (N, D) with their layout.
            context: what is known about the tokens; padding (`valid`) is neither routed nor attended to.
            causal: no token attends to a later one; padding must then come last.
            layout: where packed tokens are.

        Returns:
            y of x's shape, and the routing with its auxiliary losses.

        Raises:
            ValueError: x has another shape, or the router misses something in the context.
        """
        if x.dim() != (3 if layout is None else 2):
            raise ValueError(f"expected (B, L, D), or packed tokens (N, D) with a layout, got {tuple(x.shape)}")
        x_TD, context, routing = self._routed(x, context)
        dropout = self.dropout if self.training else 0.0
        y_TO = self._attended(x_TD, routing, Places(x.shape[:2], layout, context.valid, causal, dropout))
        y_TO = self.for_others(self._for_valid(y_TO, context), routing)
        return y_TO.view(*x.shape[:-1], self.out_dim), routing

    def _attended(self, x_TD: Tensor, routing: Routing, places: Places) -> Tensor:
        raise NotImplementedError

    def _weights(self, routing: Routing) -> Tensor:
        """(T, E) the weight of every head for every token; 0 where it was not chosen. Counts who was."""
        n = len(self.view)
        columns_TK = self.view.to_columns(routing.ids, none=n)
        if self.training:
            chosen = torch.zeros(n + 1, dtype=torch.int64, device=columns_TK.device)
            self._count(
                chosen.scatter_add(0, columns_TK.flatten(), torch.ones_like(columns_TK).flatten())[:-1].tolist()
            )
        weights_TE = routing.weights.new_zeros(len(columns_TK), n + 1)
        return weights_TE.scatter_add(1, columns_TK, routing.weights)[:, :-1]


class MoA(HeadLayer):
    """Mixture of attention heads: a token asks with k heads of many; keys and values are one for all heads.

        layer = MoA(64, heads=16, size=16, router={"name": "topk", "k": 4})
        y, routing = layer(x, causal=True)             # x (B, L, 64)

    The output is Σ w Wₒ attention(q, K, V) over a token's heads. Costs k attentions and not as many as there are heads.
    Arguments as in `HeadLayer`.
    """

    kind = "moa"
    known = {"moa": Heads}

    def __init__(self, dim: int, heads: int = 8, size: int | None = None, **options: Any) -> None:
        super().__init__(dim, heads, size, **options)
        assert self.hidden is not None
        self.kv = nn.Linear(dim, 2 * self.hidden, bias=options.get("bias", True))

    def _heads(self, key: str) -> Heads:
        cohort = self.cohorts[key]
        assert isinstance(cohort, Heads)
        return cohort

    def new_cohort(self, n: int, kind: int = 0) -> Expert:
        cohort = super().new_cohort(n, kind)
        if cohort.hidden != self.hidden:
            raise ValueError(f"hidden: expected the size {self.hidden} of the keys of all heads, got {cohort.hidden}")
        return cohort

    def _attended(self, x_TD: Tensor, routing: Routing, places: Places) -> Tensor:
        if self.dispatch == "dense":
            return self._with_all(x_TD, routing, places)
        sort = Sorted(routing, self.view, on_host(self.dispatch, x_TD, self.cohorts))
        blocks = list(sort.blocks(idle=distributed()))
        own = [slice(block.low, block.high) for block in blocks]
        order_N = torch.cat([sort.order_N[rows] for rows in own])
        q_NS = torch.cat(
            [
                self._heads(b.key).q.work(x_TD.index_select(0, sort.token_N[rows]), b, self.dispatch)
                for b, rows in zip(blocks, own, strict=True)
            ]
        )
        q_TKS = q_NS.new_zeros(routing.ids.numel(), q_NS.shape[1]).index_copy(0, order_N, q_NS)
        h_TKS = self._attention(q_TKS.view(*routing.ids.shape, q_NS.shape[1]), x_TD, places)
        h_NS = (h_TKS * routing.weights.unsqueeze(2).to(h_TKS.dtype)).flatten(0, 1)
        y_TO: Tensor | None = None
        for block, rows in zip(blocks, own, strict=True):
            part_NS = h_NS.index_select(0, sort.order_N[rows])
            out_NO = self._heads(block.key).o.work(part_NS, block, self.dispatch)
            y_TO = out_NO.new_zeros(len(x_TD), self.out_dim) if y_TO is None else y_TO
            y_TO.index_add_(0, sort.token_N[rows], out_NO)
        assert y_TO is not None, "a layer has at least one cohort"
        if self.training:
            self._count(sort.counts_E if sort.ends is None else sort.counts)
        return y_TO

    def _attention(self, q_TKS: Tensor, x_TD: Tensor, places: Places) -> Tensor:
        k, v = (places.sequences(part.unsqueeze(1)) for part in self.kv(x_TD).chunk(2, dim=1))
        q = places.sequences(q_TKS)
        return places.tokens(places.attend(q, k.expand_as(q), v.expand_as(q)))

    def _with_all(self, x_TD: Tensor, routing: Routing, places: Places) -> Tensor:
        """The same with every head's query of every token."""
        cohorts = [self._heads(key) for key in self.cohorts]
        q_TES = torch.cat([cohort.q.every(x_TD) for cohort in cohorts]).transpose(0, 1)
        h_TES = self._attention(q_TES, x_TD, places)
        h_TES = h_TES * self._weights(routing).unsqueeze(2).to(h_TES.dtype)
        w_ESO = torch.cat([cohort.o.w for cohort in cohorts])
        return h_TES.flatten(1) @ w_ESO.flatten(0, 1).to(h_TES.dtype)

    def flops_for_all(self) -> int:
        return super().flops_for_all() + 2 * self.kv.weight.numel()


class MoH(HeadLayer):
    """Mixture of heads: ordinary attention whose heads count by how the router weighs them for each token.

        layer = MoH(64, heads=6, size=8, shared=2, router={"name": "topk", "k": 4})
        y, routing = layer(x, causal=True)             # x (B, L, 64)

    Shared heads work for all tokens with weights α₁ softmax(x Wₛ), the chosen ones with α₂ times the router's, and
    [α₁, α₂] = softmax(x Wₕ). All heads are computed: any token may attend with any of them, so what routing leaves out is
    no time but capacity that tokens share. Heads added later may have another size.

    Args:
        shared: heads that every token uses beside those that the router chooses.
        scaled: each group's weights are multiplied by its number of heads and α by two, so that equal weights give
            ordinary attention (as in the authors' code); without, weights sum to one (as in the paper's formula).

    Further arguments as in `HeadLayer`; `dispatch` is 'auto' or 'dense'.
    """

    kind = "moh"
    known = {"moh": KeyedHeads}

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        size: int | None = None,
        *,
        shared: int = 0,
        scaled: bool = True,
        bias: bool = True,
        **options: Any,
    ) -> None:
        if size is None and dim % (heads + shared):
            raise ValueError(f"heads: expected heads and shared to divide dim {dim}, or a size, got {heads + shared}")
        super().__init__(dim, heads, size or dim // (heads + shared), bias=bias, **options)
        self.scaled = scaled
        self.bias = nn.Parameter(torch.zeros(self.out_dim)) if bias else None
        if shared:
            self.shared = self.new_cohort(shared)
            self.shared.reset_parameters()
            self.balance = nn.Linear(dim, 2, bias=False)
            self.share = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    @torch.no_grad()
    def adopt(self, qkv: nn.Linear, out: nn.Linear, heads: int) -> None:
        """Become ordinary attention, whose first heads are the shared ones: the start of tuning a trained model.

        With equal weights (`scaled`) this layer then gives what the attention gave.

        Args:
            qkv: D to queries, keys and values, (3, heads, S) of the output.
            out: (heads, S) of the input to O.
            heads: how many the attention has.

        Raises:
            ValueError: another number or size of heads than here, or no bias on both sides.
        """
        cohorts = [c for c in (self.shared, *self.cohorts.values()) if isinstance(c, KeyedHeads)]
        n, size = sum(cohort.n for cohort in cohorts), cohorts[0].hidden
        assert size is not None
        alike = qkv.weight.shape == (3 * n * size, self.dim) and all(cohort.hidden == size for cohort in cohorts)
        if n != heads or not alike:
            raise ValueError(
                f"heads: expected {heads} of size {qkv.out_features // (3 * heads)}, shared ones among them, as the "
                f"attention has, got {n} of size {size}"
            )
        if self.bias is None or qkv.bias is None or out.bias is None:
            raise ValueError("bias: expected one here and in the attention")
        weights, biases, first = qkv.weight.view(3, n, size, -1).mT, qkv.bias.view(3, n, size), 0
        for cohort in cohorts:
            own = slice(first, first + cohort.n)
            first += cohort.n
            for part, w, b in zip((cohort.q, *cohort.keyed()), weights, biases, strict=True):
                part.w.copy_(w[own])
                if part.b is not None:
                    part.b.copy_(b[own])
            cohort.o.w.copy_(out.weight.view(-1, n, size).permute(1, 2, 0)[own])
        self.bias.copy_(out.bias)

    def _attended(self, x_TD: Tensor, routing: Routing, places: Places) -> Tensor:
        weights_TE = self._weights(routing)
        if self.scaled:
            weights_TE = weights_TE * (routing.ids >= 0).sum(1, keepdim=True)
        y_TO: Tensor | None = None
        if isinstance(self.shared, KeyedHeads):
            alpha_T2, own_TE = self._shares(x_TD, self.shared.n)
            y_TO = self.shared.weighted(x_TD, alpha_T2[:, :1] * own_TE, places)
            weights_TE = alpha_T2[:, 1:] * weights_TE
        # what no token may ask with is left out; where other processes wait for gradients, only what none may see
        alone = isinstance(routing, UniformRouting) and not distributed()
        first, seen = 0, set(routing.experts if alone else routing.columns or self.ids)
        for key, ids in self.cohort_ids.items():
            own_TE = weights_TE[:, first : first + len(ids)]
            first += len(ids)
            if seen.isdisjoint(ids):
                continue
            y = self._heads(key).weighted(x_TD, own_TE, places)
            y_TO = y if y_TO is None else y_TO + y
        assert y_TO is not None, "a layer has at least one cohort"
        return y_TO if self.bias is None else y_TO + self.bias.to(y_TO.dtype)

    def _heads(self, key: str) -> KeyedHeads:
        cohort = self.cohorts[key]
        assert isinstance(cohort, KeyedHeads)
        return cohort

    def _shares(self, x_TD: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Weights of shared and chosen heads (T, 2), and of each of the `n` shared heads among them (T, E)."""
        dtype = score_dtype(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):  # as routers do
            alpha_T2 = F.linear(x_TD.to(dtype), self.balance.weight.to(dtype)).softmax(1)
            if self.share is None:
                own_TE = alpha_T2.new_ones(len(x_TD), 1)
            else:
                own_TE = F.linear(x_TD.to(dtype), self.share.weight.to(dtype)).softmax(1)
        return (2.0 * alpha_T2, n * own_TE) if self.scaled else (alpha_T2, own_TE)

    def parameter_counts(self) -> tuple[int, int]:
        total, active = super().parameter_counts()
        # a chosen head's keys and values were counted with it; all tokens use those of all heads
        cohorts = [self._heads(key) for key in self.cohorts]
        keys = [sum(p[0].numel() for part in cohort.keyed() for p in part.parameters()) for cohort in cohorts]
        every = sum(cohort.n * own for cohort, own in zip(cohorts, keys, strict=True))
        return total, active + every - max(keys) * self.router.experts_per_token(self.view)

    def flops_for_all(self) -> int:
        cohorts = [*(self._heads(key) for key in self.cohorts), self.shared]
        keyed = [(c.n, part) for c in cohorts if isinstance(c, KeyedHeads) for part in c.keyed()]
        keys = sum(n * part.flops_per_token() for n, part in keyed)
        gates = () if self.shared is None else (self.balance, self.share)
        return super().flops_for_all() + keys + sum(2 * gate.weight.numel() for gate in gates if gate is not None)
