"""One mini-batch on its way through the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """A mini-batch; strategies may extend it with samples of their own, behind the incoming ones.

    Attributes:
        x: inputs (B, ...), as the stream's transform gives them.
        y: targets, (B,) classes or (B, L) next bytes.
        task: the experience that all samples are from as an int, or one a sample, (B,); it is also the label by
            which experts and heads of a task are found.
        ids: index of each incoming sample in the stream's storage, (incoming,).
        incoming: how many samples, at the front, came from the stream.
    """

    x: Tensor
    y: Tensor
    task: int | Tensor
    ids: Tensor
    incoming: int

    def extended(self, x: Tensor, y: Tensor, task: Tensor) -> Batch:
        """This batch with further samples behind it.

        Args:
            x: (M, ...) inputs.
            y: (M, ...) targets.
            task: (M,) experiences.
        """
        return Batch(
            torch.cat((self.x, x)),
            torch.cat((self.y, y)),
            torch.cat((per_sample(self.task, self.x), task)),
            self.ids,
            self.incoming,
        )


def per_sample(value: int | Tensor, x: Tensor) -> Tensor:
    """`value` as one int64 a sample of `x`, (B,)."""
    if isinstance(value, Tensor):
        return value
    return torch.full((x.shape[0],), value, dtype=torch.int64, device=x.device)
