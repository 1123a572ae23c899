"""Experts are merged under a budget."""

from __future__ import annotations

from typing import ClassVar, Literal

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.moe import surgery
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.strategies.look import looking, total_experts


class MergeExperts(Strategy):
    """Merges experts of each layer after every experience, by weights, with hidden units in one order (M-SMoE, Li et al.
    2023).

    With a budget, pairs are merged until few enough are left. Without, the number stays: the least used expert is replaced
    by the mean of the two most used (Park 2024).

    Options:
        experts: at most this many stay in each layer; none is Park's replacement.
        pairs: which two are merged next: the two 'unused' most, the two most 'used', or the two most 'alike' (whose
            outputs on the experience's data differ least).
        weights: what each of them counts: by 'usage' in training, or 'equal'.
        align: put hidden units in one order before they are averaged (Ainsworth et al. 2022).
        samples: of the experience just learned, looked at for 'alike'.
    """

    needs: ClassVar[tuple[str, ...]] = ("moe",)
    needs_boundaries: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    def __init__(
        self,
        experts: PositiveInt | None = None,
        pairs: Literal["unused", "used", "alike"] = "unused",
        weights: Literal["usage", "equal"] = "usage",
        align: bool = True,
        samples: PositiveInt = 256,
    ) -> None:
        self.experts, self.pairs, self.weights, self.align, self.samples = experts, pairs, weights, align, samples

    def setup(self, context: Context) -> None:
        super().setup(context)
        for name, layer in context.model.moe_layers().items():
            if layer.router.routing_kind != "sparse" and (self.experts is None or self.pairs != "alike"):
                raise UserError(
                    f"strategy.merge_experts: expected routers that assign tokens to experts, whose use is counted, got "
                    f"{type(layer.router).__name__} in {name}"
                )

    def after_experience(self, segment: Segment) -> None:
        model, context = self.context.model, self.context
        if not model.moe_layers():
            return
        if self.experts is None:
            self._replace(segment)
            return
        done = surgery.merge(
            model,
            until=self.experts,
            pairs=self.pairs,
            weights="usage" if self.weights == "usage" else None,
            align=self.align,
            run=looking(context, segment, self.samples),
        )
        context.record(done, segment.last)

    def _replace(self, segment: Segment) -> None:
        """The least used expert becomes the mean of the two most used: it goes, and one with a new id comes."""
        model, context = self.context.model, self.context
        for name, layer in model.moe_layers().items():
            ranked = sorted(layer.ids, key=lambda expert: (-layer.usage.get(expert, 0), expert))
            kinds = {layer.cohort_kinds[layer.view.where[expert][0]] for expert in (*ranked[:2], ranked[-1])}
            if len(ranked) < 3 or len(kinds) > 1:
                continue
            with context.seeded(f"merged {name} {segment.number}"):
                new = layer.add_experts(
                    1,
                    "interpolated",
                    sources=ranked[:2],
                    weights="usage" if self.weights == "usage" else None,
                    align=self.align,
                    tasks=[task for task, experts in layer.tasks.items() if ranked[-1] in experts],
                )
            context.event("added", name, new, segment.last)
            context.record(surgery.remove(model, {name: ranked[-1:]}), segment.last)

    def facts(self) -> dict[str, float]:
        return total_experts(self.context)
