"""What a router is told, what it answers, and what it declares about itself.

Shape suffixes here and in the whole package: T tokens, D model dimension, E experts (router columns), K experts per
token, H hidden units of an expert, N rows (token-expert pairs) after sorting, O output dimension.

Routing is *returned*, auxiliary losses included: nothing is kept in module globals, where the losses of a second
forward or of another layer would mix with the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.moe.view import NONE, Columns, ExpertView

LEFT_OUT = -2  # in a replay: LEFT_OUT - e is expert e, chosen and left out


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What is known about the tokens beside their vectors; everything is optional.

    Attributes:
        task: task label, one int for the whole batch (fast path) or a LongTensor (T,) or (B,) with B the layer input's
            first dimension.
        token_ids: (T,) vocabulary ids, for routers that hash.
        sequence: (T,) or (B,) index of the sequence that a token belongs to.
        position: (T,) position in its sequence.
        valid: (T,) bool, False for padding: those tokens go to no expert, their output is 0 and no loss sees them.
        training: whether noise is drawn and auxiliary losses are computed; None follows the module's own mode.
        stage: training stage, for routers that change over time.
        state: the previous layer's routing state.
        generator: source of random numbers; None is torch's global one.
        replay: (T, K) expert ids to use instead of choosing, as `Routing.replay` gives them; -1 is none, -2 - e stands for
            expert e, which was chosen and is left out. Weights are computed anew for them.
        visible: ids of the experts that may be seen; the others' columns are left out (sliced, not masked).
    """

    task: Tensor | int | None = None
    token_ids: Tensor | None = None
    sequence: Tensor | None = None
    position: Tensor | None = None
    valid: Tensor | None = None
    training: bool | None = None
    stage: int = 0
    state: Any = None
    generator: torch.Generator | None = None
    replay: Tensor | None = None
    visible: tuple[int, ...] | None = None

    def for_tokens(self, lead: Sequence[int]) -> RouteContext:
        """This context with every per-token tensor flat, for an input of shape (*lead, D).

        Raises:
            ValueError: a tensor fits neither the tokens nor (for `task` and `sequence`) the first dimension.
        """
        if self.valid is self.token_ids is self.sequence is self.position is self.replay is None and not isinstance(
            self.task, Tensor
        ):
            return self  # the common case costs nothing
        tokens = 1
        for size in lead:
            tokens *= size
        flat: dict[str, Tensor] = {}
        for name in ("task", "token_ids", "sequence", "position", "valid"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 1 and value.numel() == tokens:
                continue
            if value.numel() == tokens:
                flat[name] = value.reshape(-1)
            elif name in ("task", "sequence") and value.dim() == 1 and len(lead) > 1 and value.numel() == lead[0]:
                flat[name] = value.repeat_interleave(tokens // lead[0])
            else:
                raise ValueError(
                    f"context.{name}: expected {tokens} values for input {tuple(lead)}, got {tuple(value.shape)}"
                )
        if self.replay is not None and self.replay.dim() != 2:
            flat["replay"] = self.replay.reshape(tokens, self.replay.shape[-1])
        return replace(self, **flat) if flat else self


NO_CONTEXT = RouteContext()


@dataclass(eq=False)
class Routing:
    """Sparse assignments of tokens to experts.

    Two further kinds are no assignments: `SoftRouting` and `MergeRouting`, whose ids have K = 0.

    Attributes:
        ids: (T, K) int64 stable expert ids, -1 = none.
        weights: (T, K) non-negative combination weights, 0 where the id is -1; float32 (float64 for float64 inputs).
        logits: (T, E) scores without noise, one column per visible expert; None for routers without scores.
        log_probs: (T,) log-probability of the sampled choice; None where nothing is sampled.
        columns: the expert id of each logit column.
        aux: named auxiliary losses, scalars already multiplied by their weights: add them all to the loss. Empty
            outside training.
        kind: 'sparse', 'soft' or 'merge'.
        state: what the next layer's router gets as `RouteContext.state`; None for most routers.
        dropped: how many assignments were lost to the experts' capacity, an int64 scalar; None for a router without any.
        left: (T, K) ids of the experts that were chosen and are left out (they had no place, or the second of GShard was
            not drawn), -1 where nobody was; None for a router that leaves out nobody.
        valid: (T,) bool as in the context: False for padding, which is no token to any count; None is all.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor | None = None
    log_probs: Tensor | None = None
    columns: tuple[int, ...] = ()
    aux: dict[str, Tensor] = field(default_factory=dict)
    kind: str = "sparse"
    state: Tensor | None = None
    dropped: Tensor | None = None
    valid: Tensor | None = None
    left: Tensor | None = None

    @property
    def replay(self) -> Tensor:
        """What `RouteContext.replay` takes to get this routing again, weights included.

        A weight may depend on all that were chosen, so those that are left out are told too.
        """
        return self.ids if self.left is None else torch.where(self.left == NONE, self.ids, LEFT_OUT - self.left)


def replayed(replay_TK: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """What a replay says: the columns that were chosen (0 for nobody), where nobody was, and who of them is left out.

    Raises:
        ValueError: it names an expert that is not among the columns.
    """
    left_TK = replay_TK <= LEFT_OUT
    ids_TK = torch.where(left_TK, LEFT_OUT - replay_TK, replay_TK)
    columns.check(ids_TK)
    return columns.to_columns(ids_TK), ids_TK == NONE, left_TK


def passed_on(context: RouteContext, routing: Routing) -> RouteContext:
    """The context for the next layer: what this layer's router remembers goes with it."""
    return context if routing.state is None else replace(context, state=routing.state)


class UniformRouting(Routing):
    """Every token goes to the same experts with equal weights; `ids` and `weights` are made only when asked for.

    Attributes:
        experts: the expert ids.
        valid: (T,) bool or None, as in the context.
    """

    def __init__(self, experts: tuple[int, ...], x_TD: Tensor, valid: Tensor | None, columns: tuple[int, ...]) -> None:
        self.experts, self.valid, self.columns = experts, valid, columns
        self.tokens, self.device = x_TD.shape[0], x_TD.device
        self.dtype = score_dtype(x_TD.dtype)
        self.logits = self.log_probs = self.state = self.dropped = self.left = None
        self.aux = {}
        self.kind = "sparse"

    @cached_property
    def ids(self) -> Tensor:
        ids_TK = torch.tensor(self.experts, dtype=torch.int64, device=self.device).repeat(self.tokens, 1)
        return ids_TK if self.valid is None else ids_TK.masked_fill(~self.valid.unsqueeze(1), NONE)

    @cached_property
    def weights(self) -> Tensor:
        k = len(self.experts)
        weights_TK = torch.full((self.tokens, k), 1.0 / k, dtype=self.dtype, device=self.device)
        return weights_TK if self.valid is None else weights_TK.masked_fill(~self.valid.unsqueeze(1), 0.0)


class SoftRouting(Routing):
    """Experts work on slots, which are mixtures of a group's tokens (Soft MoE): nothing is assigned, all is weighed.

    A group is a sequence; its tokens are padded to the longest. S slots of the visible experts, in column order.

    Attributes:
        dispatch_GLS: how much of each token is in each slot; 0 for padding.
        combine_GLS: how much of each slot's output each token gets; 0 for padding.
        slots: slots of one expert.
        place_T: where each token is among the G · L places; None when token t is at place t.
    """

    def __init__(
        self,
        dispatch_GLS: Tensor,
        combine_GLS: Tensor,
        slots: int,
        columns: tuple[int, ...],
        place_T: Tensor | None = None,
    ) -> None:
        tokens = dispatch_GLS.shape[0] * dispatch_GLS.shape[1] if place_T is None else len(place_T)
        super().__init__(*_nobody(tokens, dispatch_GLS), columns=columns, kind="soft")
        self.dispatch_GLS, self.combine_GLS, self.slots, self.place_T = dispatch_GLS, combine_GLS, slots, place_T


class MergeRouting(Routing):
    """Each group of tokens has an expert of its own, merged from all by their weights (SMEAR).

    Attributes:
        weights_GE: what each visible expert contributes to each group's expert, in column order.
        group_T: the group of each token; None when all are in one.
    """

    def __init__(self, weights_GE: Tensor, group_T: Tensor | None, tokens: int, columns: tuple[int, ...]) -> None:
        super().__init__(*_nobody(tokens, weights_GE), columns=columns, kind="merge")
        self.weights_GE, self.group_T = weights_GE, group_T


def _nobody(tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights of tokens that are not assigned to anyone."""
    return torch.empty(tokens, 0, dtype=torch.int64, device=like.device), like.new_empty(tokens, 0)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that scores and weights are computed in: float32 for low precision, else the input's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Router(nn.Module):
    """The base of routers: tokens in, `Routing` out, with columns that are owned per cohort of experts.

    The class attributes declare what the router is; a model that needs what is not declared must refuse it (a decoder
    with a router that looks at future tokens would report false losses).

    Attributes:
        causal: a token's routing does not depend on later tokens.
        permutation_equivariant: permuting the tokens permutes the routing.
        exact_k: every valid token gets the same number of experts.
        isolatable: given the experts that a task may see, its routing does not depend on any other expert.
        needs: names of the `RouteContext` fields that must be given.
        needs_with: option -> its value -> further such names, for needs that an option brings.
        causal_with: option -> its value -> False where that value makes a causal router look ahead.
        routing_kind: the kind of its routings: 'sparse' (assignments), 'soft' or 'merge'.
        columns: cohort key -> module whose parameters have one row per expert of that cohort.
    """

    supplied: ClassVar[tuple[str, ...]] = ("dim",)
    causal: bool = False
    permutation_equivariant: bool = False
    exact_k: bool = False
    isolatable: bool = False
    needs: frozenset[str] = frozenset()
    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {}
    causal_with: ClassVar[dict[str, dict[str, bool]]] = {}
    routing_kind: ClassVar[str] = "sparse"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.columns = nn.ModuleDict()

    def new_columns(self, n: int) -> nn.Module | None:
        """A module whose parameters and buffers have `n` rows, zeros so far; None for a router without any."""
        return None

    def reset_columns(self, columns: nn.Module) -> None:
        """Draw initial values for what `new_columns` made."""

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        """Assign tokens to experts.

        Args:
            x_TD: tokens.
            context: what else is known about them, already flat.
            experts: the layer's experts.

        Raises:
            ValueError: something in `needs` is missing, or a replay names an unknown expert.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_TD, context, experts)")

    def experts_per_token(self, experts: ExpertView) -> int:
        """How many experts work on one token, for parameter and FLOP counts."""
        raise NotImplementedError(f"{type(self).__name__} must define experts_per_token(experts)")

    def active_parameters(self) -> int:
        """How many of the router's parameters take part in routing one token; all, unless a router looks some up."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating point operations that routing one token costs; each number that takes part is multiplied and added once."""
        return 2 * self.active_parameters()

    def learn(self, routing: Routing, reward: Tensor) -> Tensor:
        """The deferred loss of a router that learns from a reward which arrives after the model's loss."""
        raise NotImplementedError(f"{type(self).__name__} does not learn from rewards")
