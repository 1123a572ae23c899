"""Function distance regularisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Context
from cmoe.strategies.memories import Memories
from cmoe.strategies.recall import compared, widened

AT_ONCE = 256


class FDR(Memories):
    """Function distance regularisation: the answers at each experience's end are kept (Benjamin et al. 2019).

    https://arxiv.org/abs/1805.08289, in the form that Dark Experience compares to (Buzzega et al. 2020).
    The loss gains ``alpha`` · mean over recalled samples of ‖softmax(z) − softmax(z_end)‖₂, with z_end the logits when
    the sample's experience ended. Each of the t experiences so far holds size / t samples. Outputs that the head got
    since are not compared; in a multi-head those of the sample's own task are.

    Options:
        size: samples of all experiences together.
        batch: samples drawn at each step; default is the trainer's batch size.
        alpha: weight of the distance.
    """

    called: ClassVar[str] = "fdr"
    with_classes: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 500, batch: PositiveInt | None = None, alpha: NonNegative = 1.0) -> None:
        super().__init__(size)
        self.batch, self.alpha = batch, alpha

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.draw = self.batch or int(context.options["trainer"]["batch_size"])

    def share(self, learned: int) -> int:
        return self.size // learned

    @torch.no_grad()
    def extra(self, x: Tensor, y: Tensor, experience: int) -> dict[str, Tensor]:
        context = self.context
        was = context.model.training
        context.model.eval()
        made = []
        for part in x.split(AT_ONCE):
            where = torch.full((len(part),), experience)
            inputs = context.inputs(part, where, None, train=False)
            made.append(context.model(inputs, context.route(experience)).logits.cpu())
        context.model.train(was)
        logits = torch.cat(made)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"logits": logits, "outputs": torch.full((len(x),), logits.shape[1])}

    def joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = max(part["logits"].shape[1] for part in parts)
        return super().joined([part | {"logits": widened(part["logits"], width)} for part in parts])

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if not len(self) or not self.alpha:
            return {}
        rows = self.random(self.draw)
        old = self.recalled(rows)
        assert isinstance(old.task, Tensor)
        logits = self.context.model(old.x, self.context.route(old.task, training=True)).logits
        stored = self.held["logits"].index_select(0, rows).to(logits.device)
        outputs = self.held["outputs"].index_select(0, rows).to(logits.device)
        known = compared(self.context.model.head, stored, outputs, old.task)
        now = logits[:, : stored.shape[1]].masked_fill(~known, float("-inf")).softmax(1)
        then = stored.masked_fill(~known, float("-inf")).softmax(1)
        return {"fdr": self.alpha * torch.linalg.vector_norm(now - then, dim=1).mean()}
