"""What a strategy may do inside the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from cmoe.learners.batch import Batch
from cmoe.learners.model import Output

Forward = Callable[[Batch], tuple[Output, dict[str, Tensor]]]


class StepHooks:
    """The points of a step where strategies act; each does nothing until it is overridden.

    Attributes:
        owns_gradients: it has a rule of its own by which a batch becomes gradients; one strategy of a run may.
    """

    owns_gradients: ClassVar[bool] = False

    def extend_batch(self, batch: Batch) -> Batch:
        """The batch to train on, with samples of the strategy's own behind the incoming ones."""
        return batch

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Further losses by name, scalars, added to the task's loss."""
        return {}

    def gradients(self, batch: Batch, forward: Forward) -> tuple[Output, dict[str, Tensor]]:
        """Fill the gradients, which are empty, from a batch; called of the strategy with `owns_gradients` alone.

        Args:
            batch: as `extend_batch` of all strategies left it.
            forward: outputs and named losses of a batch; every other strategy's losses are among them. May be called
                any number of times.

        Returns:
            The outputs that `after_step` sees, and the losses to log.
        """
        raise NotImplementedError

    def edit_gradients(self) -> None:
        """Change the gradients in place, before clipping."""

    def after_step(self, batch: Batch, output: Output) -> None:
        """Look at the batch and the outputs that the step was made from; the weights are already updated."""


def overridden(hooks: Sequence[StepHooks], name: str) -> list[Callable[..., Any]]:
    """The bound methods `name` of those that define their own, so that a step calls nothing in vain."""
    return [getattr(h, name) for h in hooks if getattr(type(h), name) is not getattr(StepHooks, name)]
