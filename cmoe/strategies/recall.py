"""What strategies need that put recalled samples through the model on their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.learners.batch import Batch
from cmoe.learners.head import Head
from cmoe.learners.objective import Language, Objective

IGNORED = -100


def recalled_batch(x: Tensor, y: Tensor, experience: Tensor) -> Batch:
    """Recalled samples as a batch in which nothing came from the stream."""
    return Batch(x, y, experience, experience[:0], 0)


def each_loss(objective: Objective, logits: Tensor, batch: Batch) -> Tensor:
    """The task's loss of each sample, (B,); of a text the sum over its positions."""
    selected, targets = objective.select(logits, batch)
    ignored = PADDING if isinstance(objective, Language) else IGNORED
    losses = F.cross_entropy(selected, targets, ignore_index=ignored, reduction="none")
    return losses.view(logits.shape[0], -1).sum(1)


def widened(held: Tensor, width: int) -> Tensor:
    """Logits (M, U) with zeros behind for outputs that the head got since, (M, `width`)."""
    return held if held.shape[1] >= width else F.pad(held, (0, width - held.shape[1]))


def compared(head: Head, stored: Tensor, outputs: Tensor, task: Tensor) -> Tensor:
    """Which stored logits there is something to compare to, (M, U) bool.

    Args:
        head: of the model.
        stored: (M, U).
        outputs: how many outputs the head had when each sample was stored, (M,).
        task: (M,); in a multi-head a sample's own outputs alone count.
    """
    known = torch.arange(stored.shape[1], device=stored.device) < outputs.unsqueeze(1)
    if head.kind == "multi":
        known &= head.own_task().index_select(0, task)[:, : stored.shape[1]]
    return known
