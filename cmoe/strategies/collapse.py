"""A model with experts ends as a dense one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.moe import MoELayer, surgery
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.strategies.look import looking


class Collapse(Strategy):
    """Makes a dense network of each layer of experts after the last experience, or an earlier one.

    Shared experts and a `base` stay beside it. The row evaluated then, and all later training, is of the dense model.

    Options:
        after: experiences that are learned with experts; default is all.
        how: 'merge' (the mean of all experts), 'single' (the most used one) or 'distil' (learn what the layer does on the
            last experience's data, beginning with the mean).
        weights: what each expert counts in the mean: by 'usage' in training, or 'equal'.
        align: put hidden units in one order before they are averaged (Ainsworth et al. 2022).
        samples: of the last experience, looked at for 'distil'.
        steps: of the training for 'distil', in each layer.
    """

    needs: ClassVar[tuple[str, ...]] = ("moe",)
    needs_boundaries: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    def __init__(
        self,
        after: PositiveInt | None = None,
        how: Literal["merge", "single", "distil"] = "merge",
        weights: Literal["usage", "equal"] = "usage",
        align: bool = True,
        samples: PositiveInt = 512,
        steps: PositiveInt = 300,
    ) -> None:
        self.after, self.how, self.weights, self.align = after, how, weights, align
        self.samples, self.steps = samples, steps
        self.errors: dict[str, float] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.last = len(context.stream.segments) - 1 if self.after is None else self.after - 1
        for name, layer in context.model.moe_layers().items():
            if type(layer).forward is not MoELayer.forward:
                raise UserError(f"strategy.collapse: expected experts in place of dense networks, got heads in {name}")
            if self.how == "merge" and len({layer.cohort_kinds[key] for key in layer.cohort_ids}) > 1:
                raise UserError(f"strategy.collapse.how: merge needs experts of one kind and size, {name} has several")

    def segments(self, segments: list[Segment]) -> list[Segment]:
        if self.after is None:
            self.last = len(segments) - 1
        return segments

    def after_experience(self, segment: Segment) -> None:
        context = self.context
        if segment.number != self.last or not context.model.moe_layers():
            return
        done = surgery.collapse(
            context.model,
            self.how,
            weights="usage" if self.weights == "usage" else None,
            align=self.align,
            run=looking(context, segment, self.samples),
            steps=self.steps,
            generator=torch.Generator().manual_seed(context.seed("collapse")),
        )
        self.errors = {name: after for name, (_, after) in done.errors.items()}
        context.record(done, segment.last)

    def facts(self) -> dict[str, float]:
        if not self.errors:
            return {}
        return {"experts/distillation_error": sum(self.errors.values()) / len(self.errors)}

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors = dict(state["errors"])
