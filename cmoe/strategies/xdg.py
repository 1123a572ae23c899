"""Context-dependent gating."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cmoe.config.types import Fraction
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context, Strategy
from cmoe.strategies.beside import refuse_beside
from cmoe.strategies.gates import BESIDE, hidden_layers, place


class XdG(Strategy):
    """Context-dependent gating: for every task a random share of the hidden units is silent (Masse et al. 2018).

    https://doi.org/10.1073/pnas.1803839115.
    The activities of each hidden layer are multiplied by the task's gates, zeros and ones drawn once and never
    trained, in training and in evaluation. Meant beside a penalty on weights, such as `si` or `online_ewc`.
    The paper's figures are with a share of 0.8. An output layer has no gates: with `model.head: multi` each task has
    outputs of its own, in a shared one all train the same. Works on the backbone `mlp`.

    Options:
        share: of each hidden layer's units that are silent for a task; at least one is not.
    """

    owns_predict: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(self, share: Fraction = 0.8) -> None:
        self.share = share
        self.gates: dict[int, list[Tensor]] = {}  # by task, (H,) bool of each layer

    def setup(self, context: Context) -> None:
        super().setup(context)
        refuse_beside(context, "xdg", BESIDE)
        layers = hidden_layers(context, "xdg")
        self.sizes = [layer.out_features for layer in layers]
        place(context.model.backbone, layers, self.gate)

    def gate(self, layer: int, context: RouteContext) -> Tensor:
        """The gates of a layer's units, (H,) or (B, H) bool."""
        task = context.task
        if isinstance(task, int):
            return self.of(task)[layer]
        assert task is not None
        every = [self.of(t)[layer] for t in range(len(self.context.stream.experiences))]
        return torch.stack(every).index_select(0, task)

    def of(self, task: int) -> list[Tensor]:
        """A task's gates of each layer, (H,) bool, from a seed of its own."""
        if task not in self.gates:
            generator = torch.Generator().manual_seed(self.context.seed(f"xdg {task}"))
            drawn = []
            with torch.inference_mode(False):  # an evaluation may be the first to ask
                for size in self.sizes:
                    silent = torch.randperm(size, generator=generator)[: min(round(self.share * size), size - 1)]
                    open_ = torch.ones(size, dtype=torch.bool).index_fill(0, silent, False)
                    drawn.append(open_.to(self.context.device))
            self.gates[task] = drawn
        return self.gates[task]

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        return None if task is None else self.context.model(x, self.context.route(task)).logits

    def facts(self) -> dict[str, float]:
        return {"xdg/bytes": float(sum(g.numel() * g.element_size() for gates in self.gates.values() for g in gates))}

    def state_dict(self) -> dict[str, Any]:
        return {"gates": {task: list(gates) for task, gates in self.gates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.context.device
        self.gates = {task: [g.to(device) for g in gates] for task, gates in state["gates"].items()}
