"""From logits and targets to the task's loss, and from logits to predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.learners.batch import Batch, per_sample
from cmoe.learners.head import Head


class Classification:
    """Cross-entropy over the outputs that `train_outputs` names.

    Args:
        head: the model's head.
        train_outputs: 'all', 'seen' or 'current'.
    """

    def __init__(self, head: Head, train_outputs: str) -> None:
        self.head, self.train_outputs = head, train_outputs
        self._columns: Tensor | None = None
        self._translate: Tensor | None = None
        self._direct = False

    def begin(self, seen: Sequence[int], current: Sequence[int]) -> None:
        """Fix the outputs for a segment that brings classes `current`, after and with which `seen` are known."""
        self._direct = False
        self._columns = self._translate = None
        if self.head.kind == "multi":
            return
        if self.train_outputs != "all":
            self._columns = self.head.columns(seen if self.train_outputs == "seen" else current)
        if self._columns is not None:
            self._translate = torch.full((len(self.head),), -1, device=self._columns.device)
            self._translate[self._columns] = torch.arange(len(self._columns), device=self._columns.device)
        self._direct = self._columns is None and self.head.is_identity()

    def select(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits (B, V) that the loss sees and the index of each target among them, (B,).

        A sample whose class is not among them (an old one of a buffer under `train_outputs: current`) has target
        −100, which cross-entropy leaves out.
        """
        if self._direct:
            return logits, batch.y
        targets = self.head.targets(batch.y, batch.task)
        if self.head.kind == "multi":
            if isinstance(batch.task, int):
                columns = self.head.columns(self.head.classes, batch.task)
                if columns is None:
                    return logits, targets
                # a task's outputs are one block, so its columns are contiguous
                first = int(columns[0])
                return logits[:, first : first + len(columns)], targets - first
            own = self.head.own_task().index_select(0, per_sample(batch.task, batch.x))
            return logits.masked_fill(~own, float("-inf")), targets
        if self._columns is None:
            return logits, targets
        assert self._translate is not None
        targets = self._translate.index_select(0, targets)
        return logits.index_select(1, self._columns), targets.masked_fill(targets < 0, -100)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy, a scalar; 0 where no target is among the outputs."""
        selected, targets = self.select(logits, batch)
        if self.train_outputs != "current":
            return F.cross_entropy(selected, targets)
        total = F.cross_entropy(selected, targets, reduction="sum")  # a batch may be all old, beside 'cumulative'
        return total / (targets >= 0).sum().clamp(min=1)


class Language:
    """Cross-entropy of the next byte over all positions that are not padding.

    Args:
        head: the model's head, 256 outputs (each a byte) a block.
    """

    def __init__(self, head: Head) -> None:
        self.head = head

    def begin(self, seen: Sequence[int], current: Sequence[int]) -> None:
        """Every segment predicts the same bytes."""

    def select(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits (B·L, 256) of each sample's own block and the bytes (B·L,)."""
        if len(self.head.blocks) > 1:
            if isinstance(batch.task, int):
                block = self.head.block_tasks.index(batch.task)
                logits = logits[..., block * 256 : (block + 1) * 256]
            else:
                table = torch.tensor([self.head.block_tasks.index(int(t)) for t in batch.task], device=logits.device)
                blocks = logits.unflatten(-1, (len(self.head.blocks), 256))
                index = table.view(-1, 1, 1, 1).expand(-1, blocks.shape[1], 1, 256)
                logits = blocks.gather(2, index).squeeze(2)
        return logits.flatten(0, 1), batch.y.flatten()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of a byte in nats, a scalar."""
        selected, targets = self.select(logits, batch)
        return F.cross_entropy(selected, targets, ignore_index=PADDING)


Objective = Classification | Language
