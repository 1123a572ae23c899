"""Tasks packed into one network by pruning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.config.types import Count, Fraction
from cmoe.errors import UserError
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.beside import refuse_beside
from cmoe.strategies.isolation import Fixed, need_own_outputs, train_outputs_of

Norm = nn.modules.batchnorm._NormBase
Layer = (nn.Linear, nn.modules.conv._ConvNd)
FREE = 0

_DRAWS = "it would draw the weights of old tasks anew"
_RECALLS = "its samples of old tasks would not go through their tasks' weights"
_REBUILDS = "it makes other layers of those whose weights are packed"
BESIDE = {
    **dict.fromkeys(("gdumb", "separate"), _DRAWS),
    **dict.fromkeys(("replay", "der", "er_ace", "mir", "a_gem", "gem", "fdr", "cumulative", "lwf"), _RECALLS),
    "upcycle": _REBUILDS,
}


class PackNet(Strategy):
    """PackNet: each task gets a part of the weights by pruning, and the rest is left for later ones (Mallya & Lazebnik 2018).

    https://arxiv.org/abs/1711.05769.
    After an experience the given share of each layer's free weights, those with the least magnitude, is set to zero
    and stays free; the others are trained on for some epochs without them and are frozen then. A task sees the
    weights of its own and of earlier tasks, so its logits stay bit-identical; which they are is known by the task
    label. Layers are the linear ones and convolutions of the backbone; all else in it (biases, norms, embeddings) learns
    in the first experience only. Each task has outputs of its own.

    Options:
        prune: share of each layer's free weights that is left to later experiences.
        retrain: epochs of training after pruning.
    """

    owns_predict: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(self, prune: Fraction = 0.5, retrain: Count = 1) -> None:
        self.prune, self.retrain = prune, retrain
        self.owner: dict[str, Tensor] = {}  # by the weight's name, which segment's it is, from 1; or FREE
        self.segment_of: dict[int, int] = {}  # experience -> segment, from 1
        self._fixed = Fixed()

    def setup(self, context: Context) -> None:
        super().setup(context)
        refuse_beside(context, "packnet", BESIDE)
        if context.model.moe_layers():
            raise UserError("strategy.packnet: expected a model without experts, whose weights it packs, got model.moe")
        need_own_outputs(context, "packnet")
        self.layers = {
            f"backbone.{name}.weight": module.weight
            for name, module in context.model.backbone.named_modules()
            if isinstance(module, Layer)
        }
        if not self.layers:
            raise UserError("strategy.packnet: expected a backbone with linear layers or convolutions, got none")

    def before_experience(self, segment: Segment) -> None:
        model = self.context.model
        for name, weight in self.layers.items():
            if name not in self.owner:
                self.owner[name] = torch.full_like(weight, FREE, dtype=torch.int16)
        self.segment_of |= dict.fromkeys(segment.experiences, segment.number + 1)
        train_outputs_of(model.head, segment.experiences)
        if segment.number > 0:
            for name, parameter in model.named_parameters():
                if name.startswith("backbone.") and name not in self.layers:
                    parameter.requires_grad_(False)

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        return [*phases, Phase("retrain", epochs=self.retrain)] if self.retrain else phases

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        movable = segment.number + 1 if phase.name == "retrain" else FREE
        self._fixed = Fixed((weight, self.owner[name] == movable) for name, weight in self.layers.items())
        if segment.number > 0:
            for module in self.context.model.modules():
                if isinstance(module, Norm):
                    module.eval()  # running statistics are part of what is frozen

    def edit_gradients(self) -> None:
        self._fixed.clear()

    def after_step(self, batch: Any, output: Any) -> None:
        self._fixed.restore()

    def after_phase(self, segment: Segment, phase: Phase) -> None:
        if phase.name == "train":
            for name, weight in self.layers.items():
                self._pack(weight, self.owner[name], segment.number + 1)

    @torch.no_grad()
    def _pack(self, weight: Tensor, owner: Tensor, number: int) -> None:
        """Give the larger of a layer's free weights to a segment and set the others to zero."""
        free = (owner == FREE).flatten().nonzero().flatten()
        # a stable order decides between equal ones, of which there are many where layers were never trained
        order = weight.flatten().index_select(0, free).abs().argsort(stable=True)
        cut = round(self.prune * len(free))
        owner.view(-1).index_fill_(0, free.index_select(0, order[cut:]), number)
        weight.masked_fill_(owner == FREE, 0)

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        number = self.segment_of.get(task) if task is not None else None
        if number is None:
            return None
        weights = {}
        if number < max(self.segment_of.values()):  # of the latest all weights count: what is free is zero
            for name, weight in self.layers.items():
                owner = self.owner[name]
                weights[name] = torch.where((owner != FREE) & (owner <= number), weight, 0)
        return torch.func.functional_call(self.context.model, weights, (x, self.context.route(task))).logits

    def facts(self) -> dict[str, float]:
        total = sum(o.numel() for o in self.owner.values())
        free = sum(int((o == FREE).sum()) for o in self.owner.values())
        held = sum(o.numel() * o.element_size() for o in self.owner.values())
        return {"packnet/bytes": float(held), "packnet/free": free / max(1, total)}

    def state_dict(self) -> dict[str, Any]:
        return {"owner": dict(self.owner), "segment_of": dict(self.segment_of)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owner = {name: owner.to(self.context.device) for name, owner in state["owner"].items()}
        self.segment_of = dict(state["segment_of"])
