"""The Mixture-of-Experts layer: a router, cohorts of experts, and experts that come, freeze and go at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmoe.moe import lifecycle
from cmoe.moe.dispatch import PATHS, Path, dispatch
from cmoe.moe.experts import EXPERTS, Cohorts, Expert
from cmoe.moe.optimizer import ParameterChange
from cmoe.moe.routers import ROUTERS
from cmoe.moe.routing import NO_CONTEXT, RouteContext, Router, Routing, UniformRouting
from cmoe.moe.view import ExpertView

Spec = str | Mapping[str, Any] | Callable[..., Any]


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
        dispatch: 'auto', 'grouped', 'loop' or 'bmm'.

    Raises:
        ValueError: a name or option is unknown or out of range.
    """

    _anchor: Tensor

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
    ) -> None:
        super().__init__()
        if dispatch not in PATHS:
            raise ValueError(f"dispatch: expected one of {PATHS}, got {dispatch!r}")
        self.dim, self.hidden, self.out_dim = dim, hidden, out_dim or dim
        self.dispatch = dispatch
        self._factory, self._options = _resolve("expert", expert, EXPERTS)
        make_router, router_options = _resolve("router", router, ROUTERS)
        self.router: Router = make_router(dim=dim, **router_options)
        self.cohorts = Cohorts()
        self.cohort_ids: dict[str, tuple[int, ...]] = {}
        self.frozen_keys: set[str] = set()
        self.tasks: dict[int, tuple[int, ...]] = {}
        self.usage: dict[int, int] = {}
        self._next_expert = self._next_cohort = 0
        self.view = ExpertView({}, {})
        # goes where the layer goes: new experts get its device and type
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self.add_experts(experts)

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
        lead = x.shape[:-1]
        context = NO_CONTEXT if context is None else context.for_tokens(lead)
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.dim)
        routing = self.router(x_TD, context, self.view)
        if isinstance(routing, UniformRouting):
            y_TO = self._uniform(x_TD, routing)
            used = dict.fromkeys(routing.experts, x_TD.shape[0])
        else:
            y_TO, used = dispatch(x_TD, routing, self.view, self.cohorts, self.dispatch)
        if self.training:
            for expert, count in used.items():
                self.usage[expert] = self.usage.get(expert, 0) + count
        return (y_TO if x.dim() == 2 else y_TO.view(*lead, self.out_dim)), routing

    def _uniform(self, x_TD: Tensor, routing: UniformRouting) -> Tensor:
        # Every token to the same experts: dense layers, nothing to sort.
        y_TO: Tensor | None = None
        for expert in routing.experts:
            key, row = self.view.where[expert]
            out_TO = self.cohorts[key].single(x_TD, row)
            y_TO = out_TO if y_TO is None else y_TO + out_TO
        assert y_TO is not None
        if len(routing.experts) > 1:
            y_TO = y_TO * (1.0 / len(routing.experts))
        return y_TO if routing.valid is None else y_TO.masked_fill(~routing.valid.unsqueeze(1), 0.0)

    # -- experts at run time ------------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all experts, in the order of the router's columns."""
        return self.view.ids

    @property
    def frozen_ids(self) -> set[int]:
        """Ids of the frozen experts."""
        return {expert for key in self.frozen_keys for expert in self.cohort_ids[key]}

    def add_experts(
        self,
        n: int,
        init: Literal["fresh", "copy", "zero"] = "fresh",
        source: int | None = None,
        tasks: Iterable[int] | int | None = None,
    ) -> list[int]:
        """Add a cohort of experts and its router columns; existing parameters stay the very same objects.

        Args:
            n: how many.
            init: 'fresh' draws weights, 'copy' copies those of `source`, 'zero' draws them with an output of 0.
                Router columns are always drawn.
            source: id to copy; default is the expert most used in training (the lowest id among equals).
            tasks: task labels that the new experts are assigned to, beside those assigned already.

        Returns:
            Their ids. Their parameters are new to an optimizer (`migrate_optimizer(..., added=layer.parameters())`).

        Raises:
            ValueError: n < 1, an unknown `init` or `source`, or a kind that has no output of 0.
        """
        return lifecycle.add(self, n, init, source, tasks)

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
                {"key": key, "experts": list(ids), "frozen": int(key in self.frozen_keys)}
                for key, ids in self.cohort_ids.items()
            ],
            "tasks": [[task, list(ids)] for task, ids in self.tasks.items()],
            "usage": [[expert, count] for expert, count in sorted(self.usage.items())],
        }

    def restore_structure(self, structure: Mapping[str, Any]) -> None:
        """Take a saved structure, so that `load_state_dict` then succeeds; draws no random numbers.

        Cohorts that are here already stay; others come with weights of zero, to be loaded. Build optimizers afterwards.
        """
        cohorts = {entry["key"]: tuple(entry["experts"]) for entry in structure["cohorts"]}
        for key in list(self.cohort_ids):
            if cohorts.get(key) != self.cohort_ids[key]:
                for modules in self.stacked_modules():
                    if key in modules:
                        del modules[key]
        for key, ids in cohorts.items():
            if key not in self.cohorts:
                self.install(key, self.new_cohort(len(ids)), fresh=False)
        self._next_expert, self._next_cohort = structure["next_expert"], structure["next_cohort"]
        self.frozen_keys = {entry["key"] for entry in structure["cohorts"] if entry["frozen"]}
        self.tasks = {task: tuple(ids) for task, ids in structure["tasks"]}
        self.usage = {expert: count for expert, count in structure["usage"]}  # noqa: C416
        self.set_cohorts(cohorts)
        self.apply_frozen()

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters in all, and those active for one token (the router's all, and its experts')."""
        router = sum(p.numel() for p in self.router.parameters())
        experts = sum(p.numel() for p in self.cohorts.parameters())
        one = max(sum(p[0].numel() for p in cohort.parameters()) for cohort in self.cohorts.values())
        return router + experts, router + one * self.router.experts_per_token(self.view)

    # -- for lifecycle.py ---------------------------------------------------------------------------------------

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
        self.view = ExpertView(self.cohort_ids, self.tasks)

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

    def new_cohort(self, n: int) -> Expert:
        """A cohort of this layer's kind with weights of zero, not yet part of the layer."""
        return self._factory(n=n, dim=self.dim, hidden=self.hidden, out_dim=self.out_dim, **self._options)

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


def _resolve(kind: str, spec: Spec, known: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    if isinstance(spec, Mapping):
        options = dict(spec)
        spec = options.pop("name", "")
    else:
        options = {}
    if isinstance(spec, str):
        if spec not in known:
            raise ValueError(f"{kind}: expected one of {sorted(known)}, got {spec!r}")
        return known[spec], options
    return spec, options
