"""Task inference by Gaussians of the classes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import Probability
from cmoe.errors import UserError
from cmoe.strategies.base import Context
from cmoe.strategies.gaussians import log_density, shrunk
from cmoe.strategies.infer_task import Answer, InferTask


class InferGaussian(InferTask):
    """The task label is inferred by a Gaussian of each class: p(t | x) ∝ Σ over the task's classes of N(x; m, Σ).

    As tasks are told apart in SEED's and other generative classifiers' way (Rypeść et al. 2024,
    https://arxiv.org/abs/2401.10191); the answer itself stays the network's. Covariances are shrunk, (1 − ε) Σ + ε s I
    with s the mean variance of the dimensions, so that none is singular. Classes count alike.

    Options:
        on: 'inputs', or 'features' of the network as it was after the first experience.
        covariance: each 'class' has its own, or all have one together ('shared').
        shrinkage: ε, above 0.
        decide: the 'best' experience's answer, or 'all' answers weighted by their probabilities.
    """

    called: ClassVar[str] = "infer_gaussian"

    def __init__(
        self,
        on: Literal["inputs", "features"] = "inputs",
        covariance: Literal["class", "shared"] = "class",
        shrinkage: Probability = 0.1,
        decide: Literal["best", "all"] = "all",
    ) -> None:
        super().__init__(on, decide)
        self.covariance, self.shrinkage = covariance, shrinkage
        self.mean: dict[tuple[int, int], Tensor] = {}  # by experience and class, (D,)
        self.scatter: dict[tuple[int, int], Tensor] = {}  # mean product of deviations, (D, D); () for all together
        self.count: dict[tuple[int, int], int] = {}
        self._factors: dict[tuple[int, int], Tensor] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        if not self.shrinkage:
            raise UserError(f"strategy.{self.called}.shrinkage: expected a number above 0 and up to 1, got 0")

    def learn(self, experience: int, x_ND: Tensor, y_N: Tensor) -> None:
        for c in y_N.unique().tolist():
            own = x_ND[y_N == c]
            key, mean = (experience, c), own.mean(0)
            around = own - mean
            self.mean[key], self.count[key] = mean, len(own)
            self._add(key if self.covariance == "class" else (-1, -1), around.T @ around, len(own))
        self._factors.clear()

    def _add(self, key: tuple[int, int], product: Tensor, count: int) -> None:
        before = self.scatter.get(key)
        self.scatter[key] = product if before is None else before + product
        if key not in self.mean:
            self.count[key] = self.count.get(key, 0) + count

    def _factor(self, key: tuple[int, int]) -> Tensor:
        """The Cholesky factor of a class's shrunk covariance."""
        whose = key if self.covariance == "class" else (-1, -1)
        if whose not in self._factors:
            covariance = self.scatter[whose] / max(self.count[whose], 1)
            self._factors[whose] = torch.linalg.cholesky(shrunk(covariance, self.shrinkage))
        return self._factors[whose]

    def scores(self, x: Tensor, answer: Answer) -> Tensor:
        x_BD = self.looked_at(x)
        of_task: dict[int, list[Tensor]] = {e: [] for e in self.known}
        for key, mean in self.mean.items():
            of_task[key[0]].append(log_density(x_BD, mean, self._factor(key)))
        return torch.stack([torch.stack(of_task[e], 1).logsumexp(1) for e in self.known], 1)

    def tensors(self) -> list[Tensor]:
        return [*self.mean.values(), *self.scatter.values()]

    def state_dict(self) -> dict[str, Any]:
        held = {"mean": dict(self.mean), "scatter": dict(self.scatter), "count": dict(self.count)}
        return {**super().state_dict(), **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.context.device
        self.mean = {key: value.to(device) for key, value in state["mean"].items()}
        self.scatter = {key: value.to(device) for key, value in state["scatter"].items()}
        self.count = dict(state["count"])
        self._factors.clear()
