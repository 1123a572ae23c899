"""The diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.learners.batch import Batch
from cmoe.strategies.base import Context
from cmoe.strategies.sample_gradients import Value, of_many, of_one

# empirical: the true label; confidence: the true label, weighted by p(y|x); exact: the mean over the model's own p(y|x)
Kind = Literal["empirical", "confidence", "exact"]


def add_many(
    context: Context, kind: Kind, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int
) -> None:
    """Add squared gradients of samples x (B, ...), y (B,), vectorised over them."""
    for value in _values(context, kind, x, y, task):
        gradients, losses = of_many(context, value, named, x, y, task)
        weight = torch.ones_like(losses) if kind == "empirical" else torch.exp(-losses)
        for n, g in gradients.items():
            total[n] += torch.einsum("b,b...->...", weight, g.square())


def add_one(
    context: Context, kind: Kind, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int
) -> None:
    """Add the squared gradient of one sample."""
    for value in _values(context, kind, x, y, task):
        gradients, loss = of_one(context, value, named, x, y, task)
        weight = 1.0 if kind == "empirical" else float(torch.exp(-loss))
        for n, g in gradients.items():
            total[n] += weight * g.square()


def _values(context: Context, kind: Kind, x: Tensor, y: Tensor, task: int) -> Iterator[Value]:
    """The losses whose weighted squared gradients make the Fisher: that of the label, or of each output in turn."""
    if kind != "exact":
        yield context.objective.loss
        return
    with torch.no_grad():
        logits = context.model(x[:1], context.route(task)).logits
        selected, _ = context.objective.select(logits, Batch(x[:1], y[:1], task, y[:1], 1))
    for output in range(selected.shape[1]):
        target = torch.tensor([output], device=selected.device)

        def loss(logits: Tensor, batch: Batch, target: Tensor = target) -> Tensor:
            return F.cross_entropy(context.objective.select(logits, batch)[0], target)

        yield loss
