"""How logits are read as predictions: which outputs count, and which samples."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cmoe.learners.objective import PADDING

# logits and targets of a batch -> log-probabilities (N, C), index of the right output (N,), and which of all the
# batch's predictions these N are
Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def read_classes(classes_U: Tensor, columns: Tensor | None) -> Read:
    """Reads logits (B, U) as a choice among some outputs; samples whose class is not among them are left out.

    Args:
        classes_U: the class that each output stands for; those of `columns` are different.
        columns: the outputs to choose from; None is all.
    """
    own = classes_U if columns is None else classes_U.index_select(0, columns)

    def read(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if columns is not None:
            logits = logits.index_select(1, columns)
        match = y.unsqueeze(1) == own
        kept = match.any(1).nonzero().squeeze(1)
        target = match.index_select(0, kept).int().argmax(1)
        return F.log_softmax(logits.index_select(0, kept).float(), 1), target, kept

    return read


def read_bytes(block: int, blocks: int) -> Read:
    """Reads logits (B, L, U) as the next byte of each position that is not padding.

    Args:
        block: which 256 of the outputs count.
        blocks: how many such there are.
    """

    def read(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if blocks > 1:
            logits = logits[..., block * 256 : (block + 1) * 256]
        target = y.flatten()
        kept = (target != PADDING).nonzero().squeeze(1)
        return F.log_softmax(logits.flatten(0, 1).index_select(0, kept).float(), 1), target.index_select(0, kept), kept

    return read
