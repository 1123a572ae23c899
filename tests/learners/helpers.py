"""Small models and random batches."""

from __future__ import annotations

import torch
from torch import Tensor

from cmoe.backbones import MLP
from cmoe.learners import Batch, Head, Model


def model(kind: str, blocks: list[tuple[list[int], int]], width: int = 6, seed: int = 0) -> Model:
    """An mlp for vectors of 4 with a head of these blocks (classes, task)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Model(MLP(hidden=[width], input_shape=(4,)), Head(width, kind))
        for classes, task in blocks:
            made.head.add(classes, task)
    return made


def batch(y: list[int], task: int | list[int], seed: int = 0) -> Batch:
    """Random vectors of 4 with these classes and tasks."""
    x = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(seed))
    label: int | Tensor = task if isinstance(task, int) else torch.tensor(task)
    return Batch(x, torch.tensor(y), label, torch.arange(len(y)), len(y))
