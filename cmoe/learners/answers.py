"""What one way of predicting says of some samples, as accuracy and calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmoe.metrics.calibration import ece, reliability

BINS = 15


@dataclass
class Answers:
    """Predictions of samples with known targets, by experience; a sample may be a token.

    Attributes:
        confidence, correct, nll, brier: (n,) of each experience: probability of the chosen output, whether it was right,
            −log of the target's probability in nats, and Σ (p − target)² over outputs (Brier 1950), all float64.
        choice: (n,) the chosen output.
    """

    confidence: dict[int, Tensor] = field(default_factory=dict)
    correct: dict[int, Tensor] = field(default_factory=dict)
    nll: dict[int, Tensor] = field(default_factory=dict)
    brier: dict[int, Tensor] = field(default_factory=dict)
    choice: dict[int, Tensor] = field(default_factory=dict)

    def add(self, experience: int, log_probs_NC: Tensor, target_N: Tensor) -> None:
        """Take in some samples of an experience.

        Args:
            experience: its index.
            log_probs_NC: log-probability of each output.
            target_N: index of the right one.
        """
        log_probs = log_probs_NC.double()
        probs = log_probs.exp()
        confidence, choice = probs.max(1)
        of_target = log_probs.gather(1, target_N.unsqueeze(1)).squeeze(1)
        # Σ p² − 2 p_y + 1, without a table of ones
        brier = probs.square().sum(1) - 2.0 * of_target.exp() + 1.0
        for place, values in (
            (self.confidence, confidence),
            (self.correct, (choice == target_N).double()),
            (self.nll, -of_target),
            (self.brier, brier),
            (self.choice, choice),
        ):
            here = values.cpu()
            place[experience] = torch.cat((place[experience], here)) if experience in place else here

    def choices(self) -> Tensor:
        """The chosen outputs of all samples, (n,)."""
        return torch.cat(list(self.choice.values())) if self.choice else torch.zeros(0, dtype=torch.int64)

    def accuracies(self) -> dict[int, float]:
        """Share of right predictions by experience."""
        return {j: float(values.mean()) for j, values in self.correct.items() if len(values)}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers: accuracy, ece (15 bins), nll, brier over all samples, accuracies, and reliability bins.

        Empty without samples; nan where the model's outputs are.
        """
        if not sum(map(len, self.correct.values())):
            return {}
        confidence = torch.cat(list(self.confidence.values())).numpy()
        correct = torch.cat(list(self.correct.values())).numpy()
        return {
            "accuracy": float(correct.mean()),
            "ece": float("nan") if np.isnan(confidence).any() else ece(confidence, correct.astype(bool), BINS),
            "nll": float(torch.cat(list(self.nll.values())).mean()),
            "brier": float(torch.cat(list(self.brier.values())).mean()),
            "accuracies": self.accuracies(),
            "reliability": [list(row) for row in reliability(confidence, correct.astype(bool), BINS)],
        }
