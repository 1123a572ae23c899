"""Task inference by the nearest class mean."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import Positive
from cmoe.strategies.infer_task import Answer, InferTask


class InferPrototype(InferTask):
    """The task label is that of the nearest class mean: log p(t | x) = −min ‖x − m‖² / temperature, over the task's classes.

    A prototype of each class, as in the nearest class mean classifier (Mensink et al. 2013,
    https://doi.org/10.1109/TPAMI.2013.83); the answer itself stays the network's.

    Options:
        on: 'inputs', or 'features' of the network as it was after the first experience.
        temperature: how far from certain the nearest is, with `decide: all`.
        decide: the 'best' experience's answer, or 'all' answers weighted by their probabilities.
    """

    called: ClassVar[str] = "infer_prototype"

    def __init__(
        self,
        on: Literal["inputs", "features"] = "inputs",
        temperature: Positive = 1.0,
        decide: Literal["best", "all"] = "best",
    ) -> None:
        super().__init__(on, decide)
        self.temperature = temperature
        self.means: dict[int, Tensor] = {}  # by experience, (C, D)

    def learn(self, experience: int, x_ND: Tensor, y_N: Tensor) -> None:
        self.means[experience] = torch.stack([x_ND[y_N == c].mean(0) for c in y_N.unique().tolist()])

    def scores(self, x: Tensor, answer: Answer) -> Tensor:
        x_BD = self.looked_at(x)
        nearest = [torch.cdist(x_BD, self.means[e]).min(1).values.square() for e in self.known]
        return -torch.stack(nearest, 1) / self.temperature

    def tensors(self) -> list[Tensor]:
        return list(self.means.values())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.means = {e: m.to(self.context.device) for e, m in state["means"].items()}
