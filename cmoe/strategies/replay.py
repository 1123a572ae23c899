"""Experience replay."""

from __future__ import annotations

from typing import ClassVar, Literal

from cmoe.config.types import PositiveInt
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.rehearsal import Rehearsal


class Replay(Rehearsal):
    """Experience replay: incoming samples and samples of a buffer in one batch (Chaudhry et al. 2019).

    The loss is one mean over both; one decision per incoming sample is made after the step.

    Options:
        size: samples that the buffer holds.
        batch: samples drawn from it at each step; default is the trainer's batch size.
        policy: 'reservoir' (every sample seen equally likely to be held) or 'class_balanced'.
    """

    called: ClassVar[str] = "replay"

    def __init__(
        self,
        size: PositiveInt = 500,
        batch: PositiveInt | None = None,
        policy: Literal["reservoir", "class_balanced"] = "reservoir",
    ) -> None:
        super().__init__(size, batch, policy)

    def extend_batch(self, batch: Batch) -> Batch:
        return batch.extended(*self.recalled(self.buffer.pick(self.draw))) if len(self.buffer) else batch

    def after_step(self, batch: Batch, output: Output) -> None:
        self.keep(batch)
