"""Task inference by how certain each task's answer is."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import Positive
from cmoe.strategies.base import Segment
from cmoe.strategies.infer_task import Answer, InferTask


class InferEntropy(InferTask):
    """The task label is that of the most certain answer: log p(t | x) = −H(p(y | x, t)) / temperature.

    The entropy is that of the task's own outputs, divided by the logarithm of their number, so that tasks with different
    numbers of classes compare (von Oswald et al. 2020, https://arxiv.org/abs/1906.00695, choose by the lowest entropy).
    Costs a forward pass for each experience, and keeps nothing.

    Options:
        temperature: how far from certain the lowest entropy is, with `decide: all`.
        decide: the 'best' experience's answer, or 'all' answers weighted by their probabilities.
    """

    called: ClassVar[str] = "infer_entropy"

    def __init__(self, temperature: Positive = 0.1, decide: Literal["best", "all"] = "best") -> None:
        super().__init__("features", decide)
        self.temperature = temperature

    def after_experience(self, segment: Segment) -> None:
        self.known += [e for e in segment.experiences if e not in self.known]

    def scores(self, x: Tensor, answer: Answer) -> Tensor:
        found = []
        for e in self.known:
            log_p = answer(e)
            most = torch.tensor(float(max(log_p.shape[1], 2))).log().to(log_p)
            found.append((log_p.exp() * log_p).sum(1) / most)
        return torch.stack(found, 1) / self.temperature
