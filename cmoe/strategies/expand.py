"""Experts added for every experience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.errors import UserError
from cmoe.moe import MoELayer, TaskTable, surgery
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.look import looking, total_experts

Norm = nn.modules.batchnorm._NormBase


class Expand(Strategy):
    """Adds experts for each experience and freezes the old ones (progressive networks' idea inside MoE layers).

    With the router `task_table` the task label picks a task's experts; with a learned router all experts stay
    visible, the router grows with them, and how far old tasks are routed anew is measured, not prevented
    (Lifelong-MoE, Chen et al. 2023). Beside `upcycle` it begins when the model has experts.

    Options:
        experts: experts added to each layer at each experience after the first.
        init: weights of added experts: 'fresh', 'copy' (of the most used expert), 'nearest' (of the expert to which the
            router gives most of the new experience's data), 'interpolated' (the mean of all, weighted by use) or 'zero'
            (no output at first).
        noise: added to copies: N(0, 1) times this, times the standard deviation of each parameter's values.
        samples: of the new experience, looked at for 'nearest'.
        isolate: freeze everything but the added experts and the experience's own outputs, so that old tasks' logits
            stay bit-identical; default is true with the router `task_table`, false with a learned one.
    """

    needs_boundaries: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    def __init__(
        self,
        experts: PositiveInt = 1,
        init: Literal["fresh", "copy", "nearest", "interpolated", "zero"] = "fresh",
        noise: NonNegative = 0.0,
        samples: PositiveInt = 256,
        isolate: bool | None = None,
    ) -> None:
        self.experts, self.init, self.noise, self.samples, self.isolate = experts, init, noise, samples, isolate

    @property
    def isolated(self) -> bool:
        """Whether everything but what is added is frozen."""
        layers = self.context.model.moe_layers().values()
        by_task = all("task" in layer.router.needs for layer in layers)
        return bool(layers) and (by_task if self.isolate is None else self.isolate)

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.noise and self.init in ("fresh", "zero"):
            raise UserError(f"strategy.expand.noise: expected 0 with init '{self.init}', got {self.noise}")
        if context.model.moe_layers():
            self._check()
        elif not any(s["name"] == "upcycle" for s in context.options["strategy"]):
            raise UserError("strategy.expand: expected a model with experts, got a dense one; set model.moe")

    def _check(self) -> None:
        """Refuse what the layers or the head cannot do."""
        context = self.context
        layers = context.model.moe_layers()
        by_task = all("task" in layer.router.needs for layer in layers.values())
        if self.isolated and not (by_task and all(layer.router.isolatable for layer in layers.values())):
            name = next(type(layer.router).__name__ for layer in layers.values())
            moe = context.options["model"]["moe"]
            name = moe["router"]["name"] if moe else name
            raise UserError(f"strategy.expand: isolate needs a router that can isolate (task_table), got '{name}'")
        if self.isolated and context.model.head.kind == "shared" and context.stream.modality != "bytes":
            raise UserError(
                "strategy.expand: isolate needs model.head 'multi' or 'growing', got 'shared', whose weights all "
                "experiences train"
            )
        if self.init == "nearest" and any(isinstance(layer.router, TaskTable) for layer in layers.values()):
            raise UserError(
                "strategy.expand.init: nearest needs a router that looks at the data, got 'task_table', which goes by the "
                "label"
            )
        if self.init == "zero":
            for layer in layers.values():
                try:
                    layer.new_cohort(1).zero_output()
                except ValueError as error:
                    raise UserError(f"strategy.expand.{error}") from error

    def before_experience(self, segment: Segment) -> None:
        model, tasks = self.context.model, list(segment.experiences)
        layers = model.moe_layers()
        if not layers:
            return  # `upcycle` will bring them
        if not any(layer.tasks for layer in layers.values()):
            self._begin(segment)
        if segment.number == 0:
            return
        old = {name: [i for i in layer.ids if i not in layer.frozen_ids] for name, layer in layers.items()}
        self.context.record(surgery.freeze(model, old), segment.last)
        added = surgery.add_experts(
            model,
            self.experts,
            self.init,
            tasks=tasks,
            run=looking(self.context, segment, self.samples) if self.init == "nearest" else None,
            seeded=lambda name: self.context.seeded(f"experts {name} {segment.number}"),
            noise=self.noise,
        )
        self.context.record(added, segment.last)
        if self.isolated:
            self._isolate(layers, added.new, tasks)

    def _begin(self, segment: Segment) -> None:
        """The experts that are there work for what was learned so far; for the first experience where there was nothing."""
        self._check()
        model, layers = self.context.model, self.context.model.moe_layers()
        learned = range(segment.experiences[0]) if segment.number else segment.experiences
        for task in learned:
            self.context.record(
                surgery.assign(model, {n: layer.ids for n, layer in layers.items()}, task), segment.last
            )
        if segment.number == 0:
            for name, layer in layers.items():
                self.context.event("added", name, layer.ids, segment.last)

    def _isolate(self, layers: dict[str, MoELayer], added: dict[str, list[int]], tasks: Sequence[int]) -> None:
        """Only the added experts and the outputs that are new, or the tasks' own, go on learning."""
        model = self.context.model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, layer in layers.items():
            layer.thaw(added[name])
        new = set(self.context.seen) - set(self.context.previous)
        head = model.head
        for block, classes, task in zip(head.blocks, head.block_classes, head.block_tasks, strict=True):
            if task in tasks or (head.kind == "growing" and set(classes) <= new):
                block.requires_grad_(True)

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        if self.isolated and segment.number > 0:
            for module in self.context.model.modules():
                if isinstance(module, Norm):
                    module.eval()  # running statistics are part of what is frozen

    def facts(self) -> dict[str, float]:
        return total_experts(self.context)
