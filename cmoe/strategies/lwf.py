"""Learning without Forgetting."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from cmoe.config.types import NonNegative, Positive
from cmoe.learners.batch import Batch
from cmoe.learners.model import Model, Output
from cmoe.strategies.base import Phase, Segment, Strategy
from cmoe.strategies.teacher import as_it_is, restored, state_of


class LwF(Strategy):
    """Learning without Forgetting: the old network's answers on new data are kept (Li & Hoiem 2017).

    From the second experience on the loss gains ``alpha`` · mean of −Σ q_old log q_new over the old classes, both
    softmaxes at the given temperature. With a warm-up the outputs of the new classes are first trained alone, on
    the features of the frozen backbone, and the answers are those of the network after it.

    Options:
        alpha: weight of the distillation.
        temperature: softens both softmaxes.
        warm_up: train the new outputs alone first, for as many epochs.
        l2: weight of the sum of all squared weights, added to the loss.
    """

    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self, alpha: NonNegative = 1.0, temperature: Positive = 2.0, warm_up: bool = False, l2: NonNegative = 0.0
    ) -> None:
        self.alpha, self.temperature, self.warm_up, self.l2 = alpha, temperature, warm_up, l2
        self.teacher: Model | None = None

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        if segment.number == 0 or not self.warm_up or not self._has_new_outputs():
            return phases
        warm_up = Phase("warm_up", parameters=self._head, loss=self._new_outputs, hooks=False)
        return [warm_up, *phases]

    def _has_new_outputs(self) -> bool:
        """Whether the segment brings outputs that nothing has trained yet."""
        context = self.context
        known = context.stream.language or set(context.seen) == set(context.previous)
        return context.model.head.kind == "multi" or not known

    def _head(self) -> list:
        return [p for p in self.context.model.head.parameters() if p.requires_grad]

    def _new_outputs(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the outputs of the classes that the segment brings."""
        head = self.context.model.head
        if head.kind == "multi":  # each sample's loss sees its own task's outputs alone
            return {"warm_up": self.context.objective.loss(output.logits, batch)}
        new = [c for c in self.context.seen if c not in self.context.previous]
        columns = head.columns(new)
        targets = head.targets(batch.y, batch.task)
        if columns is None:
            return {"warm_up": F.cross_entropy(output.logits, targets)}
        place = columns.new_full((len(head),), -100)
        place[columns] = place.new_tensor(range(len(columns)))
        targets = place.index_select(0, targets)
        total = F.cross_entropy(output.logits.index_select(1, columns), targets, reduction="sum")
        return {"warm_up": total / (targets >= 0).sum().clamp(min=1)}  # beside 'cumulative' a batch may be all old

    def after_experience(self, segment: Segment) -> None:
        self._remember()  # now, before another strategy changes the network for the next experience

    def after_phase(self, segment: Segment, phase: Phase) -> None:
        if phase.name == "warm_up":
            self._remember()

    def _remember(self) -> None:
        """Take the present network as the teacher."""
        self.teacher = as_it_is(self.context)

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        losses = {}
        if self.teacher is not None and self.alpha:
            losses["distillation"] = self.alpha * self._distillation(output, batch)
        if self.l2:
            losses["l2"] = self.l2 * sum(
                ((p * p).sum() for p in self.context.model.parameters() if p.requires_grad), output.logits.new_zeros(())
            )
        return losses

    def _distillation(self, output: Output, batch: Batch) -> Tensor:
        assert self.teacher is not None
        head = self.teacher.head
        answers = self.teacher(batch.x, self.context.route(batch.task)).logits
        new = output.logits[..., : answers.shape[-1]]  # outputs are only ever added behind
        if head.kind == "multi":
            return self._per_task(new, answers)
        columns = head.columns(self.context.previous)
        if columns is not None and self.context.stream.modality != "bytes":
            new, answers = new.index_select(-1, columns), answers.index_select(-1, columns)
        return self._soft_cross_entropy(new, answers)

    def _per_task(self, new: Tensor, answers: Tensor) -> Tensor:
        """A multi-head is distilled head by head, over the tasks met before; mean over heads."""
        assert self.teacher is not None
        head = self.teacher.head
        terms, begin = [], 0
        for classes, task in zip(head.block_classes, head.block_tasks, strict=True):
            end = begin + len(classes)
            if task in self._before:
                terms.append(self._soft_cross_entropy(new[..., begin:end], answers[..., begin:end]))
            begin = end
        return sum(terms, new.new_zeros(())) / max(1, len(terms))

    def _soft_cross_entropy(self, new: Tensor, answers: Tensor) -> Tensor:
        target = F.softmax(answers / self.temperature, dim=-1)
        return -(target * F.log_softmax(new / self.temperature, dim=-1)).sum(-1).mean()

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        self._before = range(segment.experiences[0])

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.teacher)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher = restored(self.context, state)
