"""The Mixture-of-Experts layer: a router, cohorts of experts, and experts that come, freeze and go at run time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cmoe.moe import lifecycle, soft
from cmoe.moe.dispatch import PATHS, Path, dispatch, each_assignment, maybe_again
from cmoe.moe.experts import EXPERTS, Cohorts, Expert
from cmoe.moe.kinds import Kind, Spec, resolve
from cmoe.moe.losses import mutual_distillation_loss
from cmoe.moe.merging import Weights
from cmoe.moe.optimizer import ParameterChange
from cmoe.moe.processes import distributed, reached
from cmoe.moe.routers import ROUTERS
from cmoe.moe.routing import (
    NO_CONTEXT,
    MergeRouting,
    RouteContext,
    Router,
    Routing,
    SoftRouting,
    UniformRouting,
)
from cmoe.moe.view import NONE, ExpertView

UNITS = ("tokens", "sequences", "feature maps")


class MoELayer(nn.Module):
    """A layer of experts that stands where a feed-forward network or a hidden layer is.

    Experts have ids for life, counted from 0 in the order of addition; removing one renumbers none. Experts added
    together form a *cohort*, which owns their stacked weights and their router columns and is frozen as a whole; acting
    on a part of a cohort splits it.

        layer = MoELayer(64, hidden=128, experts=4, router={"name": "topk", "k": 2})
        y, routing = layer(x)                          # x (..., 64)
        loss = task_loss(y) + sum(routing.aux.values())
        new = layer.add_experts(1, tasks=[1])          # [4]
        layer.freeze([0, 1, 2, 3])

    Args:
        dim: input dimension D.
        hidden: hidden units of one expert; None lets the expert kind choose.
        out_dim: output dimension O; default D.
        experts: experts at the start, one cohort.
        expert: a kind's name, a mapping `name:` with options, or a callable taking n, dim, hidden and out_dim as
            keywords and returning an `Expert`.
        router: likewise; the callable takes dim.
        dispatch: 'auto', 'grouped', 'loop', 'bmm' or 'dense', see `cmoe.moe.dispatch`.
        more: further cohorts of a kind or size of their own: mappings with `experts`, and `expert` and `hidden` where
            they differ from the layer's (experts of different sizes: HMoE, Wang et al. 2024; zero, copy and constant
            experts: MoE++, Jin et al. 2024).
        shared: experts that work on every token beside those that the router chooses, with weight 1 (DeepSeekMoE, Dai
            et al. 2024; with one of them and a router of k = 1 the residual MoE of Rajbhandari et al. 2022).
        base: a module (..., D) to (..., O) whose output the experts add to, such as the feed-forward network that was
            here before (experts as LoRA or adapters). Freeze it to keep it.
        distillation: weight of the mutual distillation loss among the experts of a token (MoDE, Xie et al. 2024).
        recompute: keep no hidden units for the backward pass but compute them again: less memory, more time. Routing is
            not repeated, so that its noise, counters and losses are as without.

    Raises:
        ValueError: a name or option is unknown or out of range.
    """

    known: ClassVar[Mapping[str, Any]] = EXPERTS  # kinds by name
    described: dict[str, Any] | None = None  # how to build it again, where an operation put it (cmoe.moe.surgery)
    inner: int  # dimensions between the leading ones and D that belong to one unit: 0 a token, 2 a feature map
    _anchor: Tensor
    _tally: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        out_dim: int | None = None,
        *,
        experts: int = 4,
        expert: Spec = "ffn",
        router: Spec = "topk",
        dispatch: Path = "auto",
        more: Sequence[Mapping[str, Any]] = (),
        shared: int = 0,
        base: nn.Module | None = None,
        distillation: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if dispatch not in PATHS:
            raise ValueError(f"dispatch: expected one of {PATHS}, got {dispatch!r}")
        self.dim, self.hidden, self.out_dim = dim, hidden, out_dim or dim
        self.dispatch, self.distillation, self.recompute = dispatch, distillation, recompute
        make_router, router_options = resolve("router", router, ROUTERS)
        self.router: Router = make_router(dim=dim, **router_options)
        if distillation and self.router.routing_kind != "sparse":
            raise ValueError("distillation: expected 0 with a router that assigns tokens to no expert")
        self.kinds = [Kind.of(expert, hidden, self.known)]
        self.inner = 0
        self.cohorts = Cohorts()
        self.cohort_ids: dict[str, tuple[int, ...]] = {}
        self.cohort_kinds: dict[str, int] = {}
        self.frozen_keys: set[str] = set()
        self.tasks: dict[int, tuple[int, ...]] = {}
        self._usage: dict[int, int] = {}
        self._next_expert = self._next_cohort = self._built = 0
        self.view = ExpertView({}, {})
        # goes where the layer goes: new experts get its device and type
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self.register_buffer("_tally", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.add_experts(experts)
        for entry in more:
            options: dict[str, Any] = {"experts": 1, "expert": expert, "hidden": hidden} | dict(entry)
            if unknown := sorted(set(options) - {"experts", "expert", "hidden"}):
                raise ValueError(f"more: expected 'experts', 'expert' and 'hidden', got {unknown[0]!r}")
            self.kinds.append(Kind.of(options["expert"], options["hidden"], self.known))
            lifecycle.add(self, options["experts"], "fresh", None, None, len(self.kinds) - 1)
        self._built = len(self.kinds)  # those that a layer of the same arguments has too
        self.shared: Expert | None = None
        if shared:
            first = self.cohorts["0"]
            if first.widens and first.hidden:  # together they are one wide expert, which costs one product
                self.shared = self.kinds[0].make(1, dim, self.out_dim, hidden=shared * first.hidden)
            else:
                self.shared = self.new_cohort(shared)
            self.shared.reset_parameters()
        self.base = base

    def forward(self, x: Tensor, context: RouteContext | None = None) -> tuple[Tensor, Routing]:
        """Route tokens and combine their experts' outputs.

        Args:
            x: (..., D).
            context: what is known about the tokens; T is the product of x's leading dimensions.

        Returns:
            y (..., O), and the routing with its auxiliary losses.

        Raises:
            ValueError: the router misses something in the context, or it does not fit x.
        """
        x_TD, context, routing = self._routed(x, context)
        y_TO = self._combined(x_TD, routing)
        if self.shared is not None:
            y_TO = y_TO + self._for_valid(maybe_again(self.recompute, self._shared, x_TD), context)
        if self.base is not None:
            y_TO = y_TO + self._for_valid(self.base(x_TD), context)
        return self.for_others(y_TO, routing).reshape(*x.shape[:-1], self.out_dim), routing

    def for_others(self, y_TO: Tensor, routing: Routing) -> Tensor:
        """y, with gradients for other processes also of what this batch may not see, and of rows that routers only look up."""
        if not (self.training and distributed()):
            return y_TO
        seen = set(routing.experts if isinstance(routing, UniformRouting) else routing.columns)
        unseen = [self.cohorts[key] for key, ids in self.cohort_ids.items() if seen.isdisjoint(ids)]
        return reached(y_TO, (self.router, *unseen))

    def _routed(self, x: Tensor, context: RouteContext | None) -> tuple[Tensor, RouteContext, Routing]:
        """The units one after the other, (T, D) or (T, ..., D), their context, and where each goes."""
        inner = self.inner
        lead, unit = x.shape[: x.dim() - 1 - inner], x.shape[x.dim() - 1 - inner : -1]
        context = NO_CONTEXT if context is None else context.for_tokens(lead)
        if "sequence" in self.router.needs and context.sequence is None and len(lead) > 1:
            context = replace(context, sequence=_sequences(lead, x.device))
        x_TD = x.reshape(-1, *unit, self.dim)
        routed_TD = x_TD if not inner else x_TD.flatten(1, inner).mean(1)
        return x_TD, context, self.router(routed_TD, context, self.view)

    def _combined(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if self.distillation and self.training:
            return self._distilled(x_TD, routing)
        if isinstance(routing, UniformRouting):
            if self.training:
                for expert in routing.experts:
                    self._usage[expert] = self._usage.get(expert, 0) + x_TD.shape[0]
            return self._uniform(x_TD, routing)
        if isinstance(routing, SoftRouting):
            return maybe_again(self.recompute, soft.mix, x_TD, routing, self.view, self.cohorts)
        if isinstance(routing, MergeRouting):
            return maybe_again(self.recompute, soft.merge, x_TD, routing, self.view, self.cohorts)
        y_TO, load = dispatch(x_TD, routing, self.view, self.cohorts, self.dispatch, self.recompute)
        if self.training:
            self._count(load)
        return y_TO

    def _count(self, load: list[int] | Tensor) -> None:
        if isinstance(load, Tensor):  # the host does not know, and need not wait
            self._tally.add_(load)
            return
        for expert, count in zip(self.ids, load, strict=True):
            if count:
                self._usage[expert] = self._usage.get(expert, 0) + count

    def _uniform(self, x_TD: Tensor, routing: UniformRouting) -> Tensor:
        # Every token to the same experts: dense layers, nothing to sort.
        y_TO: Tensor | None = None
        for expert in routing.experts:
            key, row = self.view.where[expert]
            out_TO = maybe_again(self.recompute, self.cohorts[key].single, x_TD, row)
            y_TO = out_TO if y_TO is None else y_TO + out_TO
        assert y_TO is not None
        if len(routing.experts) > 1:
            y_TO = y_TO * (1.0 / len(routing.experts))
        return y_TO if routing.valid is None else _masked(y_TO, routing.valid)

    def _distilled(self, x_TD: Tensor, routing: Routing) -> Tensor:
        each_TKO = each_assignment(x_TD, routing, self.view, self.cohorts, self.dispatch, self.recompute)
        present_TK = routing.ids != NONE
        loss = mutual_distillation_loss(each_TKO.flatten(2), present_TK)
        routing.aux["expert_distillation"] = self.distillation * loss
        columns_N = self.view.to_columns(routing.ids, none=len(self.view)).reshape(-1)
        self._count(torch.bincount(columns_N, minlength=len(self.view) + 1)[:-1].tolist())
        return torch.einsum("tk,tk...->t...", routing.weights.to(each_TKO.dtype), each_TKO)

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared is not None
        return self.shared.single(x_TD, 0) if self.shared.n == 1 else self.shared.every(x_TD).sum(0)

    def _for_valid(self, y_TO: Tensor, context: RouteContext) -> Tensor:
        return y_TO if context.valid is None else _masked(y_TO, context.valid)

    # -- experts at run time ------------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all experts, in the order of the router's columns."""
        return self.view.ids

    @property
    def usage(self) -> dict[int, int]:
        """Tokens that each expert worked on while training, by id; experts without any may be missing."""
        if len(self._tally):
            self._count(self._tally.tolist())
            self._tally.zero_()
        return self._usage

    def route(self, x: Tensor, context: RouteContext | None = None) -> Routing:
        """Where each unit of x goes, without any expert's work; arguments as for `forward`."""
        return self._routed(x, context)[2]

    @property
    def frozen_ids(self) -> set[int]:
        """Ids of the frozen experts."""
        return {expert for key in self.frozen_keys for expert in self.cohort_ids[key]}

    def add_experts(
        self,
        n: int,
        init: Literal["fresh", "copy", "nearest", "interpolated", "zero"] = "fresh",
        source: int | None = None,
        tasks: Iterable[int] | int | None = None,
        expert: str | Mapping[str, Any] | None = None,
        hidden: int | None = None,
        *,
        sources: Sequence[int] | None = None,
        weights: Weights = "usage",
        align: bool = True,
        tokens: Tensor | None = None,
        context: RouteContext | None = None,
        noise: float = 0.0,
    ) -> list[int]:
        """Add a cohort of experts and its router columns; existing parameters stay the very same objects.

        Args:
            n: how many.
            init: 'fresh' draws weights; 'copy' copies those of `source`; 'nearest' copies the expert to which the router
                gives most of `tokens` (the sum of its weights over them); 'interpolated' takes the weighted mean of
                `sources`; 'zero' draws them with an output of 0. Copies are of an expert of the same kind. Router columns
                are always drawn.
            source: id to copy; default is the expert most used in training (the lowest id among equals).
            tasks: task labels that the new experts are assigned to, beside those assigned already.
            expert: their kind, by name or as a mapping `name:` with options; default is that of what they are copies of,
                else the layer's first.
            hidden: hidden units of one of them; default likewise.
            sources: ids of those between which to interpolate; default is all of the same kind.
            weights: what each of them counts: 'usage' (tokens worked on while training), numbers, or None (equal).
            align: put hidden units in one order before they are averaged (Ainsworth et al. 2022).
            tokens: of the new data, as this layer gets them, (N, D); for 'nearest'.
            context: what else is known about them.
            noise: added to copies, so that they do not stay equal: N(0, 1) times this, times the standard deviation of
                each parameter's values.

        Returns:
            Their ids. Their parameters are new to an optimizer (`migrate_optimizer(..., added=layer.parameters())`).

        Raises:
            ValueError: n < 1, a negative task label, an unknown `init` or `source`, or a kind that has no output of 0.
        """
        kind = 0 if expert is None and hidden is None else self.kind_number(expert, hidden)
        origins = [source] if source is not None else list(sources or ())
        if expert is None and hidden is None and origins and init in ("copy", "interpolated"):
            self.check_ids(origins)
            kind = self.cohort_kinds[self.view.where[origins[0]][0]]
        more: dict[str, Any] = {"sources": sources, "weights": weights, "align": align}
        more |= {"tokens": tokens, "context": context, "noise": noise}
        return lifecycle.add(self, n, init, source, tasks, kind, **more)

    def freeze(self, ids: Iterable[int]) -> ParameterChange:
        """Freeze experts and their router columns: no gradient, bit-identical under any optimizer.

        Returns:
            What became of parameters where only a part of a cohort is frozen; empty otherwise.

        Raises:
            ValueError: an id is unknown.
        """
        return lifecycle.set_frozen(self, ids, True)

    def thaw(self, ids: Iterable[int]) -> ParameterChange:
        """Let frozen experts and their router columns learn again; returns and raises as `freeze`."""
        return lifecycle.set_frozen(self, ids, False)

    def remove(self, ids: Iterable[int]) -> ParameterChange:
        """Remove experts for good; no other id changes. Tasks left without experts lose their assignment.

        Raises:
            ValueError: an id is unknown, or none would be left.
        """
        return lifecycle.remove(self, ids)

    def merge(self, ids: Iterable[int], weights: Weights = "usage", align: bool = True) -> tuple[int, ParameterChange]:
        """Make one expert of several, the weighted mean of their weights and router columns (M-SMoE, Li et al. 2023).

        The merged expert has an id of its own, comes last, is assigned to every task of theirs, has the sum of their use,
        and is frozen if they all were. They are removed.

        Args:
            ids: at least two, of one kind and size.
            weights: what each counts: 'usage' (tokens worked on while training, equal where there is none), numbers, or
                None (equal).
            align: put hidden units in the order of those of the expert that counts most (Ainsworth et al. 2022).

        Returns:
            Its id, and what became of the parameters: the state of an optimizer is averaged as the weights are.

        Raises:
            ValueError: an id is unknown, there are fewer than two, they differ in kind, or weights do not fit.
        """
        return lifecycle.merge(self, ids, weights, align)

    def prune(
        self, keep: int | None = None, below: float | None = None, assigned: bool = False
    ) -> tuple[list[int], ParameterChange]:
        """Remove the experts that were used least in training; one always stays.

        Args:
            keep: how many stay, the most used (the lowest ids among equals).
            below: or which go: those with a smaller share of all assignments than this.
            assigned: also those that are assigned to a task; else they stay, even if more than `keep` do then.

        Returns:
            The ids that are gone, and what became of the parameters of the others.

        Raises:
            ValueError: not exactly one of keep and below, out of range, or no use was counted yet.
        """
        return lifecycle.prune(self, keep, below, assigned)

    def reset_usage(self) -> None:
        """Count the experts' use anew from here."""
        self.usage.clear()

    def assign(self, ids: Iterable[int], task: int) -> None:
        """Let exactly these experts work for a task label.

        Raises:
            ValueError: an id is unknown, there is none, or the label is negative.
        """
        ids = tuple(dict.fromkeys(ids))
        self.check_ids(ids)
        if not ids or task < 0:
            raise ValueError(f"assign: expected at least one expert and a label from 0, got {list(ids)} and {task}")
        self.tasks.pop(task, None)  # so that the order of tasks is that of assignment
        self.tasks[task] = ids
        self.set_cohorts(self.cohort_ids)

    # -- structure ----------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """Everything beside tensors, as ints, strings and lists: what `restore_structure` takes."""
        return {
            "next_expert": self._next_expert,
            "next_cohort": self._next_cohort,
            "cohorts": [
                {
                    "key": key,
                    "experts": list(ids),
                    "frozen": int(key in self.frozen_keys),
                    "kind": self.cohort_kinds[key],
                }
                for key, ids in self.cohort_ids.items()
            ],
            "kinds": [kind.plain() for kind in self.kinds[self._built :]],
            "tasks": [[task, list(ids)] for task, ids in self.tasks.items()],
            "usage": [[expert, count] for expert, count in sorted(self.usage.items())],
        }

    def restore_structure(self, structure: Mapping[str, Any]) -> None:
        """Take a saved structure, so that `load_state_dict` then succeeds; draws no random numbers.

        Cohorts that are here already stay; others come with weights of zero, to be loaded. Build optimizers afterwards.
        """
        cohorts = {entry["key"]: tuple(entry["experts"]) for entry in structure["cohorts"]}
        self.kinds[self._built :] = [
            Kind.of(entry["expert"], entry["hidden"], self.known) for entry in structure.get("kinds", ())
        ]
        kinds = {entry["key"]: entry.get("kind", 0) for entry in structure["cohorts"]}
        for key in list(self.cohort_ids):
            if cohorts.get(key) != self.cohort_ids[key] or kinds[key] != self.cohort_kinds[key]:
                for modules in self.stacked_modules():
                    if key in modules:
                        del modules[key]
        for key, ids in cohorts.items():
            if key not in self.cohorts:
                self.install(key, self.new_cohort(len(ids), kinds[key]), fresh=False)
        self.cohort_kinds = kinds
        self._next_expert, self._next_cohort = structure["next_expert"], structure["next_cohort"]
        self.frozen_keys = {entry["key"] for entry in structure["cohorts"] if entry["frozen"]}
        self.tasks = {task: tuple(ids) for task, ids in structure["tasks"]}
        self._tally.zero_()
        self._usage = {expert: count for expert, count in structure["usage"]}  # noqa: C416
        self.set_cohorts(cohorts)
        self.apply_frozen()

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters in all, and those active for one token: all that nothing chooses, and its experts'.

        Among experts of different sizes a token is taken to go to the largest.
        """
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for p in self.cohorts.parameters())
        one = max(sum(p[0].numel() for p in cohort.parameters()) for cohort in self.cohorts.values())
        router = sum(p.numel() for p in self.router.parameters()) - self.router.active_parameters()
        return total, total - experts - router + one * self.router.experts_per_token(self.view)

    def flops_per_token(self) -> int:
        """Floating point operations of a forward pass on one token: matrix products of what works on all, and its experts'.

        Among experts of different sizes a token is taken to go to the largest. Of a unit of several places, on each place.
        """
        one = max(cohort.flops_per_token() for cohort in self.cohorts.values())
        return self.flops_for_all() + one * self.router.experts_per_token(self.view)

    def flops_for_all(self) -> int:
        """Those that every token costs: of the router, the shared experts and the base.

        Of a base, which may be any module, each matrix as if it were used once.
        """
        total = self.router.flops_per_token()
        if self.shared is not None:
            total += self.shared.n * self.shared.flops_per_token()
        if self.base is not None:
            total += sum(2 * p.numel() for p in self.base.parameters() if p.dim() > 1)
        return total

    # -- for lifecycle.py ---------------------------------------------------------------------------------------

    @property
    def like(self) -> Tensor:
        """A tensor of the device and type that new experts get."""
        return self._anchor

    def stacked_modules(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        """The dictionaries whose modules have one row per expert of a cohort."""
        return self.cohorts, self.router.columns

    def new_key(self) -> str:
        """A cohort key that was never used."""
        key = str(self._next_cohort)
        self._next_cohort += 1
        return key

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse unknown ids."""
        unknown = sorted(set(ids) - set(self.ids))
        if unknown:
            raise ValueError(f"expected expert ids among {list(self.ids)}, got {unknown}")

    def set_cohorts(self, cohort_ids: Mapping[str, tuple[int, ...]]) -> None:
        """Take over which cohort holds which experts, in this order, and tell the router."""
        self.cohort_ids = dict(cohort_ids)
        for modules in self.stacked_modules():
            ordered = {key: modules[key] for key in self.cohort_ids if key in modules}
            modules.clear()
            modules.update(ordered)
        self.cohort_kinds = {key: self.cohort_kinds[key] for key in self.cohort_ids}
        _ = self.usage  # counted by column: taken in before the columns change
        self.view = ExpertView(self.cohort_ids, self.tasks, self.frozen_keys)
        self._tally = self._tally.new_zeros(len(self.view))

    def apply_frozen(self) -> None:
        """Make `requires_grad` agree with `frozen_keys`; a frozen parameter loses a gradient left from before."""
        for modules in self.stacked_modules():
            for key, module in modules.items():
                for parameter in module.parameters():
                    parameter.requires_grad_(key not in self.frozen_keys)
                    if key in self.frozen_keys:
                        parameter.grad = None

    def new_ids(self, n: int) -> tuple[int, ...]:
        """Expert ids that were never used."""
        self._next_expert += n
        return tuple(range(self._next_expert - n, self._next_expert))

    def kind_number(self, expert: str | Mapping[str, Any] | None, hidden: int | None) -> int:
        """The index among `kinds` of what a caller asks for; a new one comes last."""
        wanted = self.kinds[0].like(expert, hidden, self.known)
        if wanted not in self.kinds:
            wanted.plain()  # refuses what could not be saved
            self.kinds.append(wanted)
        return self.kinds.index(wanted)

    def new_cohort(self, n: int, kind: int = 0) -> Expert:
        """A cohort of one of this layer's kinds with weights of zero, not yet part of the layer.

        Raises:
            ValueError: it works on other units than the layer's other experts, or not with the layer's `dispatch`.
        """
        cohort = self.kinds[kind].make(n, self.dim, self.out_dim)
        name = type(cohort).__name__
        if self.dispatch not in ("auto", *cohort.paths):
            raise ValueError(f"dispatch: expected 'auto' or one of {cohort.paths} for {name}, got {self.dispatch!r}")
        if cohort.inner not in (0, self.inner):
            if self.inner or self._built:
                raise ValueError(
                    f"expert: expected one that works on {UNITS[self.inner]}, got {name}: {UNITS[cohort.inner]}"
                )
            self.inner = cohort.inner
        return cohort

    def install(self, key: str, cohort: Expert, fresh: bool) -> None:
        """Make a cohort part of the layer, with router columns that are drawn (`fresh`) or zero."""
        like = self._anchor
        columns = self.router.new_columns(cohort.n)
        if columns is not None:
            if fresh:
                self.router.reset_columns(columns)
            self.router.columns[key] = columns.to(like).train(self.training)
        self.cohorts[key] = cohort.to(like).train(self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, out_dim={self.out_dim}, experts={len(self.ids)}, dispatch={self.dispatch}"


def _masked(y_TO: Tensor, valid_T: Tensor) -> Tensor:
    return y_TO.masked_fill(~valid_T.view(-1, *[1] * (y_TO.dim() - 1)), 0.0)


def _sequences(lead: Sequence[int], device: torch.device) -> Tensor:
    """The sequence of each token: the first leading dimension counts them, be the others positions or places of a map."""
    return torch.arange(lead[0], device=device).repeat_interleave(math.prod(lead[1:]))
