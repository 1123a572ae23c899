"""Streaming linear discriminant analysis."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import Probability
from cmoe.errors import UserError
from cmoe.strategies.base import Context
from cmoe.strategies.feature_classifier import FeatureClassifier


class SLDA(FeatureClassifier):
    """Streaming linear discriminant analysis on the features: class means and one covariance (Hayes & Kanan 2020).

    https://arxiv.org/abs/1909.01520.
    The network learns by gradient in the first experience and is frozen then. With the mean m of each class, the
    covariance Σ of all samples so far around their class's mean and Λ = ((1 − ε) Σ + ε I)⁻¹, the head has weights Λ m
    and biases −½ mᵀ Λ m; classes count alike, however many samples they have. Σ is that of all samples at once,
    whatever their order (the paper's update weighs a sample by how many of any class came before it). Outputs of
    classes without samples are never chosen.

    Options:
        train: the network learns in the 'first' experience, or 'never' (random or pretrained features).
        shrinkage: ε, above 0; 1 is the nearest class mean.
    """

    called: ClassVar[str] = "slda"

    def __init__(self, train: Literal["first", "never"] = "first", shrinkage: Probability = 1e-4) -> None:
        super().__init__(train)
        self.shrinkage = shrinkage

    def setup(self, context: Context) -> None:
        super().setup(context)
        if not self.shrinkage:  # a unit that is never active has no variance
            raise UserError("strategy.slda.shrinkage: expected a number above 0 and up to 1, got 0")
        width = context.model.head.width
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=context.device)

    def scattered(self, centred: Tensor, moved: Tensor, weight: Tensor) -> None:
        self.scatter = self.scatter + centred.T @ centred + (moved * weight.unsqueeze(1)).T @ moved

    def outputs(self) -> tuple[Tensor, Tensor]:
        covariance = self.scatter / self.count.sum().clamp(min=1)
        unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * unit
        weight = torch.linalg.solve(shrunk, self.mean.T).T
        return weight, -0.5 * (weight * self.mean).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"scatter": self.scatter}
