"""What strategies with a buffer of samples share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners.batch import Batch, per_sample
from cmoe.strategies.base import Context, Strategy
from cmoe.strategies.buffer import Buffer


class Rehearsal(Strategy):
    """Base of strategies that keep raw samples of the stream and learn from them again.

    Attributes:
        called: its name in a configuration, for errors, figures and its own random numbers.
        with_classes: it cannot work on language modelling, whose samples have no class.
        buffer: the samples held.
        draw: how many are recalled at a step.

    Args:
        size: samples that the buffer holds.
        batch: samples drawn from it at each step; None is the trainer's batch size.
        policy: of the buffer.
    """

    called: ClassVar[str]
    with_classes: ClassVar[bool] = False

    def __init__(self, size: int, batch: int | None = None, policy: str = "reservoir") -> None:
        self.size, self.batch, self.policy = size, batch, policy

    def setup(self, context: Context) -> None:
        super().setup(context)
        name = self.called
        if context.stream.language and self.policy == "class_balanced":
            raise UserError(f"strategy.{name}.policy: expected 'reservoir' for language modelling, got '{self.policy}'")
        if context.stream.language and self.with_classes:
            raise UserError(f"strategy.{name}: expected a stream with classes, got language modelling")
        self.draw = self.batch or int(context.options["trainer"]["batch_size"])
        self.storage = context.stream.experiences[0].train.x  # one for the whole stream
        self.buffer = Buffer(self.size, self.policy, torch.Generator().manual_seed(context.seed(self.called)))

    def recalled(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and experiences of the buffer's places (M,), as the model gets them."""
        raw, y, experience = self.buffer.read(places)
        x = self.context.inputs(raw, experience, self.buffer.generator)
        if x.device.type != "cpu":
            y, experience = y.to(x.device), experience.to(x.device)
        if self.context.stream.language:
            x, y = x[:, :-1], x[:, 1:]
        return x, y, experience

    def keep(self, batch: Batch, **extra: Tensor) -> None:
        """One decision for each incoming sample whether, and where, it is kept.

        Args:
            batch: of a step.
            extra: what else to keep of each incoming sample, (incoming, ...).
        """
        y = batch.y[: batch.incoming].cpu()
        places = self.buffer.places(y)
        kept = [row for row, place in enumerate(places) if place >= 0]
        if not kept:
            return
        rows = torch.tensor(kept)
        raw = self.storage.index_select(0, batch.ids.cpu().index_select(0, rows))
        task = per_sample(batch.task, batch.x)[: batch.incoming].cpu().index_select(0, rows)
        more = {name: values.detach().cpu().index_select(0, rows) for name, values in extra.items()}
        self.buffer.write([places[r] for r in kept], raw, y.index_select(0, rows), task, **more)

    def facts(self) -> dict[str, float]:
        return {f"{self.called}/samples": float(len(self.buffer)), f"{self.called}/bytes": float(self.buffer.bytes())}

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state)
