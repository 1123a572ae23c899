"""The model at work on a part of a segment's training data, for strategies that look before they act."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmoe.strategies.base import Context, Segment
from cmoe.streams import evaluation_batches

BATCH = 64


def total_experts(context: Context) -> dict[str, float]:
    """How many experts the model's layers have, as a figure to track."""
    return {"experts/total": float(sum(len(layer.ids) for layer in context.model.moe_layers().values()))}


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
