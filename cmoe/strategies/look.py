"""The model at work on a part of a segment's training data, for strategies that look before they act."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmoe.moe.surgery.observe import evaluating
from cmoe.strategies.base import Context, Segment
from cmoe.streams import Split, evaluation_batches

BATCH = 64
AT_ONCE = 256  # where no router may look at who else is in the batch


def total_experts(context: Context) -> dict[str, float]:
    """How many experts the model's layers have, as a figure to track."""
    return {"experts/total": float(sum(len(layer.ids) for layer in context.model.moe_layers().values()))}


@torch.no_grad()
def seen(context: Context, split: Split, experience: int, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What `of` makes of each sample of a split, and its class.

    Args:
        context: the run's; its model is in evaluation mode meanwhile.
        split: samples with classes.
        experience: whose they are.
        of: inputs (B, ...) to values (B, ...).

    Returns:
        (N, ...) and (N,), on the model's device, in the order of the split.
    """
    values, classes = [], []
    with evaluating(context.model):
        for batch in evaluation_batches(split, experience, context.stream.transform, AT_ONCE):
            values.append(of(context.placed(batch.x)))
            classes.append(batch.y.to(context.device))
    return torch.cat(values), torch.cat(classes)


def looking(context: Context, segment: Segment, samples: int) -> Callable[[], None]:
    """A function that calls the model on samples of the segment, as in evaluation and with their task labels.

    Args:
        context: the run's.
        segment: whose training samples.
        samples: at most so many, evenly spread over each of its experiences.
    """

    def run() -> None:
        each = -(-samples // len(segment.experiences))
        for e in segment.experiences:
            split = context.stream.experiences[e].train
            count = min(each, len(split))
            places = torch.linspace(0, max(0, len(split) - 1), count).round().to(torch.int64)
            for batch in evaluation_batches(split.subset(places), e, context.stream.transform, BATCH):
                context.model.backbone(context.placed(batch.x), context.route(e))

    return run
