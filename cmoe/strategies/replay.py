"""Experience replay."""

from __future__ import annotations

from typing import Any, Literal

import torch

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.learners.batch import Batch, per_sample
from cmoe.learners.model import Output
from cmoe.strategies.base import Context, Strategy
from cmoe.strategies.buffer import Buffer


class Replay(Strategy):
    """Experience replay: incoming samples and samples of a buffer in one batch (Chaudhry et al. 2019).

    The loss is one mean over both; one decision per incoming sample is made after the step.

    Options:
        size: samples that the buffer holds.
        batch: samples drawn from it at each step; default is the trainer's batch size.
        policy: 'reservoir' (every sample seen equally likely to be held) or 'class_balanced'.
    """

    def __init__(
        self,
        size: PositiveInt = 500,
        batch: PositiveInt | None = None,
        policy: Literal["reservoir", "class_balanced"] = "reservoir",
    ) -> None:
        self.size, self.batch, self.policy = size, batch, policy

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.policy == "class_balanced" and context.stream.language:
            raise UserError("strategy.replay.policy: expected 'reservoir' for language modelling, got 'class_balanced'")
        self.draw = self.batch or int(context.options["trainer"]["batch_size"])
        self.storage = context.stream.experiences[0].train.x  # one for the whole stream
        self.buffer = Buffer(self.size, self.policy, torch.Generator().manual_seed(context.seed("replay")))

    def extend_batch(self, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        raw, y, experience = self.buffer.draw(self.draw)
        x = self.context.inputs(raw, experience, self.buffer.generator)
        if x.device.type != "cpu":
            y, experience = y.to(x.device), experience.to(x.device)
        if self.context.stream.language:
            x, y = x[:, :-1], x[:, 1:]
        return batch.extended(x, y, experience)

    def after_step(self, batch: Batch, output: Output) -> None:
        y = batch.y[: batch.incoming].cpu()
        places = self.buffer.places(y)
        kept = [row for row, place in enumerate(places) if place >= 0]
        if not kept:
            return
        rows = torch.tensor(kept)
        raw = self.storage.index_select(0, batch.ids.cpu().index_select(0, rows))
        task = per_sample(batch.task, batch.x)[: batch.incoming].cpu().index_select(0, rows)
        self.buffer.write([places[r] for r in kept], raw, y.index_select(0, rows), task)

    def facts(self) -> dict[str, float]:
        return {"buffer/samples": float(len(self.buffer)), "buffer/bytes": float(self.buffer.bytes())}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
