"""What strategies share that keep the weights of old tasks as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners.head import Head
from cmoe.strategies.base import Context


class Fixed:
    """Entries of parameters that no step moves, bit for bit, whatever the optimizer does.

    Args:
        movable: parameters, each with the entries that may move (bool, its shape); the others keep the values that they
            have now.
    """

    def __init__(self, movable: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._held = [(p, ~free, p.detach().clone()) for p, free in movable if p.requires_grad and not free.all()]

    def clear(self) -> None:
        """Zero their gradients, so that clipping and moments do not see them."""
        for p, fixed, _ in self._held:
            if p.grad is not None:
                p.grad.masked_fill_(fixed, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what a step did to them: momentum and weight decay move what has no gradient too."""
        for p, fixed, before in self._held:
            p.copy_(torch.where(fixed, before, p))


def need_own_outputs(context: Context, name: str) -> None:
    """Refuse a head whose outputs several tasks train.

    Raises:
        UserError: the head is not a multi-head.
    """
    if context.model.head.kind != "multi":
        raise UserError(
            f"strategy.{name}: expected model.head 'multi', as other outputs are trained by later tasks too, "
            f"got '{context.model.head.kind}'"
        )


def train_outputs_of(head: Head, tasks: Sequence[int]) -> None:
    """Let only the outputs of `tasks` learn."""
    for block, task in zip(head.blocks, head.block_tasks, strict=True):
        block.requires_grad_(task in tasks)
