"""Gradients of one sample at a time, by which importances of weights are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmoe.learners.batch import Batch
from cmoe.strategies.base import Context, Segment
from cmoe.streams import Split, evaluation_batches

Value = Callable[[Tensor, Batch], Tensor]  # the scalar of a sample's logits (1, U) whose gradient is taken
# adds to the totals what samples x (B, ...), y (B,) of a task contribute: (total, trainable parameters, x, y, task)
Add = Callable[[dict[str, Tensor], dict[str, Any], Tensor, Tensor, int], None]


def mean_of_samples(context: Context, segment: Segment, many: Add, one: Add, samples: int = 0) -> dict[str, Tensor]:
    """A mean over the segment's training samples, by the name of each trainable parameter.

    Args:
        context: the run's.
        segment: whose samples.
        many: adds what a batch contributes, where single gradients can be vectorised.
        one: adds what a single sample contributes, for all other models.
        samples: of each experience at most so many, evenly spread; 0 is all.
    """
    model = context.model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    count = 0
    # routing by data cannot be vectorised over samples, a dense model can
    vectorised = not model.moe_layers() and context.stream.modality in ("image", "vector")
    for e in segment.experiences:
        split = _spread(context.stream.experiences[e].train, samples)
        for batch in evaluation_batches(split, e, context.stream.transform, 64 if vectorised else 1):
            x, y = context.placed(batch.x), batch.y.to(context.device)
            add = many if vectorised else one
            add(total, named, x, y, e)
            count += x.shape[0]
    model.train()
    return {n: f.div_(max(1, count)) for n, f in total.items()}


def _spread(split: Split, samples: int) -> Split:
    if not samples or samples >= len(split):
        return split
    return split.subset(torch.linspace(0, len(split) - 1, samples).round().to(torch.int64))


def of_many(
    context: Context, value: Value, named: dict[str, Any], x: Tensor, y: Tensor, task: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, ...) by parameter name and values (B,) of samples x (B, ...), y (B,)."""
    frozen = {n: p.detach() for n, p in context.model.named_parameters() if n not in named}

    def scalar(weights: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
        x1, y1 = one_x.unsqueeze(0), one_y.unsqueeze(0)
        output = torch.func.functional_call(context.model, {**weights, **frozen}, (x1, context.route(task)))
        return value(output.logits, Batch(x1, y1, task, y1, 1))

    weights = {n: p.detach() for n, p in named.items()}
    with torch.no_grad():  # the head keeps its tables; made inside the transform they would be dead after it
        scalar(weights, x[0], y[0])
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no batching rule
        return torch.func.vmap(torch.func.grad_and_value(scalar), in_dims=(None, 0, 0))(weights, x, y)


def of_one(
    context: Context, value: Value, named: dict[str, Any], x: Tensor, y: Tensor, task: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by parameter name, of those that the value depends on, and the value of one sample."""
    output = context.model(x, context.route(task))
    made = value(output.logits, Batch(x, y, task, y, x.shape[0]))
    gradients = torch.autograd.grad(made, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, gradients, strict=True) if g is not None}, made.detach()
