"""Experts added for every experience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.moe import MoELayer
from cmoe.strategies.base import Context, Phase, Segment, Strategy

Norm = nn.modules.batchnorm._NormBase


class Expand(Strategy):
    """Adds experts for each experience and freezes the old ones (progressive networks' idea inside MoE layers).

    With the router `task_table` the task label picks a task's experts; with a learned router all experts stay
    visible, the router grows with them, and how far old tasks are routed anew is measured, not prevented
    (Lifelong-MoE, Chen et al. 2023).

    Options:
        experts: experts added to each layer at each experience after the first.
        init: weights of added experts: 'fresh', 'copy' (of the most used expert) or 'zero' (no output at first).
        isolate: freeze everything but the added experts and the experience's own outputs, so that old tasks' logits
            stay bit-identical; default is true with the router `task_table`, false with a learned one.
    """

    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        experts: PositiveInt = 1,
        init: Literal["fresh", "copy", "zero"] = "fresh",
        isolate: bool | None = None,
    ) -> None:
        self.experts, self.init, self.isolate = experts, init, isolate

    def setup(self, context: Context) -> None:
        super().setup(context)
        layers = context.model.moe_layers()
        if not layers:
            raise UserError("strategy expand: expected a model with experts, got a dense one; set model.moe")
        by_task = all("task" in layer.router.needs for layer in layers.values())
        self.isolated = by_task if self.isolate is None else self.isolate
        if self.isolated and not (by_task and all(layer.router.isolatable for layer in layers.values())):
            name = context.options["model"]["moe"]["router"]["name"]
            raise UserError(f"strategy expand: isolate needs a router that can isolate (task_table), got '{name}'")
        if self.isolated and context.model.head.kind == "shared" and context.stream.modality != "bytes":
            raise UserError(
                "strategy expand: isolate needs model.head 'multi' or 'growing', got 'shared', whose weights all "
                "experiences train"
            )

        if self.init == "zero":
            for layer in layers.values():
                try:
                    layer.new_cohort(1).zero_output()
                except ValueError as error:
                    raise UserError(f"strategy expand.{error}") from error

    def before_experience(self, segment: Segment) -> None:
        tasks = list(segment.experiences)
        layers = self.context.model.moe_layers()
        if segment.number == 0:
            for name, layer in layers.items():
                for task in tasks:
                    layer.assign(layer.ids, task)
                self.context.event("added", name, layer.ids, segment.last)
            return
        added = {name: self._grow(name, layer, tasks, segment) for name, layer in layers.items()}
        if self.isolated:
            self._isolate(layers, added, tasks)

    def _grow(self, name: str, layer: MoELayer, tasks: Sequence[int], segment: Segment) -> list[int]:
        old = [i for i in layer.ids if i not in layer.frozen_ids]
        layer.freeze(old)
        self.context.event("frozen", name, old, segment.last)
        with self.context.seeded(f"experts {name} {segment.number}"):
            new = list(layer.add_experts(self.experts, init=self.init, tasks=list(tasks)))
        self.context.event("added", name, new, segment.last)
        return new

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
        layers: dict[str, Any] = self.context.model.moe_layers()
        return {"experts/total": float(sum(len(layer.ids) for layer in layers.values()))}
