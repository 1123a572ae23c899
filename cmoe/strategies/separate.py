"""One network per task: no sharing, no forgetting."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners.model import Model
from cmoe.strategies.base import Context, Segment, Strategy


class Separate(Strategy):
    """A network of its own for every experience, chosen by the task label; the control for adding experts."""

    owns_predict: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self) -> None:
        self.networks: dict[int, dict[str, Any]] = {}
        self._loaded: tuple[int, Model] | None = None

    def setup(self, context: Context) -> None:
        super().setup(context)
        if any(s["name"] == "expand" for s in context.options["strategy"]):
            raise UserError("strategy.separate: beside 'expand' it would draw the frozen experts anew")

    def before_experience(self, segment: Segment) -> None:
        if segment.number > 0:
            self.context.restart(f"separate {segment.number}")

    def after_experience(self, segment: Segment) -> None:
        model = self.context.model
        for experience in segment.experiences:
            self.networks[experience] = {
                "structure": model.structure(),
                "weights": {n: w.detach().clone() for n, w in model.state_dict().items()},
            }
        self._loaded = None

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        if task is None or task not in self.networks:
            return None
        if self._loaded is None or self._loaded[0] != task:
            network = self.context.fresh_model("separate network")
            network.restore_structure(self.networks[task]["structure"])
            network.load_state_dict(self.networks[task]["weights"])
            self._loaded = task, network.to(self.context.device).eval()
        return self._loaded[1](x, self.context.route(task)).logits

    def parameters(self) -> int:
        sizes = [sum(w.numel() for w in n["weights"].values()) for n in self.networks.values()]
        return sum(sizes[:-1])  # the last network is the model itself

    def state_dict(self) -> dict[str, Any]:
        return {"networks": self.networks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks = dict(state["networks"])
        self._loaded = None
