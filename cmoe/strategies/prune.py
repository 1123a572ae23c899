"""Experts that are hardly used go."""

from __future__ import annotations

from typing import ClassVar, Literal

from cmoe.config.types import PositiveInt, Probability
from cmoe.errors import UserError
from cmoe.moe import surgery
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.strategies.look import total_experts


class Prune(Strategy):
    """Removes the least used experts of each layer after every experience, by their share of the tokens in training.

    One always stays. What experts learned for a task goes with them: those that are assigned to one stay unless
    `assigned` is set.

    Options:
        keep: experts that stay in each layer at most, the most used.
        below: or remove those with a smaller share of all assignments than this.
        assigned: remove also experts that are assigned to a task (`expand` assigns all).
        count: use since the 'start', or in the 'experience' just learned.
    """

    needs: ClassVar[tuple[str, ...]] = ("moe",)
    needs_boundaries: ClassVar[bool] = True
    restructures: ClassVar[bool] = True

    def __init__(
        self,
        keep: PositiveInt | None = None,
        below: Probability | None = None,
        assigned: bool = False,
        count: Literal["start", "experience"] = "start",
    ) -> None:
        self.keep, self.below, self.assigned, self.count = keep, below, assigned, count

    def setup(self, context: Context) -> None:
        super().setup(context)
        if (self.keep is None) == (self.below is None):
            got = "both" if self.keep is not None else "none"
            raise UserError(f"strategy.prune: expected one of keep and below, got {got}")
        for name, layer in context.model.moe_layers().items():
            if layer.router.routing_kind != "sparse":
                raise UserError(
                    f"strategy.prune: expected routers that assign tokens to experts, got {type(layer.router).__name__} in "
                    f"{name}, which mixes or merges"
                )

    def before_experience(self, segment: Segment) -> None:
        if self.count == "experience" and self.context.model.moe_layers():
            surgery.reset_usage(self.context.model)

    def after_experience(self, segment: Segment) -> None:
        if self.context.model.moe_layers():
            done = surgery.prune(self.context.model, self.keep, self.below, self.assigned)
            self.context.record(done, segment.last)

    def facts(self) -> dict[str, float]:
        return total_experts(self.context)
