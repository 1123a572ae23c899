"""Dark experience replay."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.recall import compared, recalled_batch, widened
from cmoe.strategies.rehearsal import Rehearsal


class DER(Rehearsal):
    """Dark experience replay: recalled samples keep the logits they had when first seen (Buzzega et al. 2020).

    https://arxiv.org/abs/2004.07211.
    The loss gains ``alpha`` · mean of (z − z_stored)² over the logits of recalled samples and, with ``beta`` > 0
    (DER++), ``beta`` · their mean cross-entropy on a second, independent draw. Stored are the logits of the training
    step that met the sample, before its update. Outputs that the head got since are not compared; in a multi-head
    those of the sample's own task are.

    Options:
        size: samples that the buffer holds.
        batch: samples of each draw; default is the trainer's batch size.
        alpha: weight of the squared error.
        beta: weight of the cross-entropy; 0 is DER, above it is DER++.
        policy: 'reservoir' (every sample seen equally likely to be held) or 'class_balanced'.
    """

    called: ClassVar[str] = "der"
    with_classes: ClassVar[bool] = True

    def __init__(
        self,
        size: PositiveInt = 500,
        batch: PositiveInt | None = None,
        alpha: NonNegative = 0.5,
        beta: NonNegative = 0.0,
        policy: Literal["reservoir", "class_balanced"] = "reservoir",
    ) -> None:
        super().__init__(size, batch, policy)
        self.alpha, self.beta = alpha, beta

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if not len(self.buffer) or not (self.alpha or self.beta):
            return {}
        first = self.buffer.pick(self.draw)
        places = torch.cat((first, self.buffer.pick(self.draw))) if self.beta else first
        x, y, task = self.recalled(places)  # both draws in one forward
        logits = self.context.model(x, self.context.route(task, training=True)).logits
        n = len(first)
        losses = {"der": self.alpha * self._error(logits[:n], first, task[:n])}
        if self.beta:
            second = recalled_batch(x[n:], y[n:], task[n:])
            losses["replay"] = self.beta * self.context.objective.loss(logits[n:], second)
        return losses

    def _error(self, logits: Tensor, places: Tensor, task: Tensor) -> Tensor:
        """Mean squared error to the stored logits of these places."""
        stored = self.buffer.extra["logits"].index_select(0, places).to(logits.device)
        outputs = self.buffer.extra["outputs"].index_select(0, places).to(logits.device)
        known = compared(self.context.model.head, stored, outputs, task)
        error = (logits[:, : stored.shape[1]] - stored).square()
        return torch.where(known, error, 0).sum() / known.sum().clamp(min=1)

    def after_step(self, batch: Batch, output: Output) -> None:
        logits = output.logits[: batch.incoming].detach()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        width = logits.shape[1]
        if "logits" in self.buffer.extra:
            self.buffer.extra["logits"] = widened(self.buffer.extra["logits"], width)
        self.keep(batch, logits=logits, outputs=torch.full((batch.incoming,), width))
