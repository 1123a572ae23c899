"""Experience replay with asymmetric cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Context, Phase, Segment
from cmoe.strategies.recall import IGNORED
from cmoe.strategies.rehearsal import Rehearsal


class ERACE(Rehearsal):
    """ER-ACE: experience replay whose incoming samples do not push old classes away (Caccia et al. 2022).

    https://arxiv.org/abs/2104.05025.
    The loss is CE(incoming, C_in ∪ C_new) + CE(recalled, C_met), each a mean over its samples and a softmax over the
    named classes alone: those in the incoming batch and those not met before it; and all met so far. It takes the
    place of the task's loss. Whatever else extends a batch counts as recalled. Needs no boundaries.

    Options:
        size: samples that the buffer holds.
        batch: samples drawn from it at each step; default is the trainer's batch size.
        policy: 'reservoir' (every sample seen equally likely to be held) or 'class_balanced'.
    """

    called: ClassVar[str] = "er_ace"
    with_classes: ClassVar[bool] = True

    def __init__(
        self,
        size: PositiveInt = 500,
        batch: PositiveInt | None = None,
        policy: Literal["reservoir", "class_balanced"] = "reservoir",
    ) -> None:
        super().__init__(size, batch, policy)

    def setup(self, context: Context) -> None:
        super().setup(context)
        outputs = context.options["model"]["train_outputs"]
        if outputs == "current" and context.model.head.kind != "multi":
            raise UserError(
                "strategy.er_ace: expected model.train_outputs 'all' or 'seen', its recalled samples need the "
                f"outputs of old classes, got '{outputs}'"
            )
        classes = 1 + max(c for e in context.stream.experiences for c in e.classes)
        self.met = torch.zeros(classes, dtype=torch.bool, device=context.device)

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """The loss of phases that have none of their own and in which strategies act."""
        plain = [p.hooks and p.loss is None and p.objective is None for p in phases]
        return [replace(p, loss=self.loss) if own else p for p, own in zip(phases, plain, strict=True)]

    def extend_batch(self, batch: Batch) -> Batch:
        return batch.extended(*self.recalled(self.buffer.pick(self.draw))) if len(self.buffer) else batch

    def loss(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The asymmetric cross-entropy of a batch's outputs: `task` of the incoming samples, `replay` of the others."""
        logits, y, n = output.logits, batch.y, batch.incoming
        incoming = (~self.met).index_fill(0, y[:n], True)
        met = self.met.index_fill(0, y, True)
        unit = self.context.model.head.unit_classes()
        closed = torch.stack((~incoming, ~met)).index_select(1, unit)  # (2, U)
        logits = torch.cat((_without(logits[:n], closed[0]), _without(logits[n:], closed[1])))
        selected, targets = self.context.objective.select(logits, batch)
        each = F.cross_entropy(selected, targets, ignore_index=IGNORED, reduction="none")
        counted = targets != IGNORED
        losses = {"task": each[:n].sum() / counted[:n].sum().clamp(min=1)}
        if len(y) > n:
            losses["replay"] = each[n:].sum() / counted[n:].sum().clamp(min=1)
        return losses

    def after_step(self, batch: Batch, output: Output) -> None:
        self.met.index_fill_(0, batch.y[: batch.incoming], True)
        self.keep(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "met": self.met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.met[: len(state["met"])] = state["met"].to(self.met.device)  # an extended run has more classes


def _without(logits: Tensor, closed: Tensor) -> Tensor:
    """Logits (B, U) with those of closed outputs (U,) at −∞."""
    return logits.masked_fill(closed, float("-inf"))
