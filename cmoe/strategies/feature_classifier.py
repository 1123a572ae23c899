"""What strategies share whose outputs are made of statistics of the features, not trained."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners.head import NEVER
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.beside import refuse_beside
from cmoe.strategies.look import AT_ONCE
from cmoe.streams import evaluation_batches

_EXPERTS = "it changes the network that the features come from"
_DRAWS = "it would draw that network anew"
_OUTPUTS = "it makes the outputs itself"
BESIDE = {
    **dict.fromkeys(("expand", "prune", "merge_experts", "upcycle", "collapse"), _EXPERTS),
    **dict.fromkeys(("separate", "gdumb"), _DRAWS),
    **dict.fromkeys(("ncm", "slda", "icarl", "lwf", "packnet", "hat", "pnn"), _OUTPUTS),
    "cumulative": "it trains on more in later experiences, in which nothing is trained",
}


class FeatureClassifier(Strategy):
    """Base of strategies whose head is computed from the mean feature of each class, and perhaps more.

    The head stays what it is, a linear map of the features, and gets its weights from the statistics after every
    experience. So evaluation, prediction and export need no rule of their own. In a multi-head an output is a class of a
    task, in others it is a class, whichever experience its samples are from. The features are those of evaluation,
    without augmentation; each sample counts once, however many epochs there are. Later experiences have no
    phase: nothing is trained in them.

    Attributes:
        called: its name in a configuration, for errors and figures.
        count: samples of each output so far, (U,) float64.
        mean: their mean feature, (U, D) float64.

    Args:
        train: 'first' or 'never': when the network is trained by gradient.
    """

    called: ClassVar[str]

    def __init__(self, train: str) -> None:
        self.train = train

    def setup(self, context: Context) -> None:
        super().setup(context)
        name, scenario = self.called, context.options["stream"]["scenario"]
        if context.stream.language:
            raise UserError(f"strategy.{name}: expected a stream with classes, got language modelling")
        if self.train == "first" and scenario == "online":
            raise UserError(f"strategy.{name}.train: expected 'never' in scenario 'online', got '{self.train}'")
        refuse_beside(context, name, {other: why for other, why in BESIDE.items() if other != name})
        width = context.model.head.width
        self.count = torch.zeros(0, dtype=torch.float64, device=context.device)
        self.mean = torch.zeros(0, width, dtype=torch.float64, device=context.device)

    def _trains(self, segment: Segment) -> bool:
        return self.train == "first" and segment.number == 0

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """Those that there are anyway in the first experience, none later: nothing is trained then."""
        return phases if self._trains(segment) else []

    @torch.no_grad()
    def after_experience(self, segment: Segment) -> None:
        model, stream = self.context.model, self.context.stream
        was = model.training
        model.eval()
        for e in segment.experiences:
            for batch in evaluation_batches(stream.experiences[e].train, e, stream.transform, AT_ONCE):
                features = model(self.context.placed(batch.x), self.context.route(e)).features
                self.add(features.double(), model.head.targets(batch.y.to(features.device), e))
        model.train(was)
        self._write()

    def add(self, x: Tensor, units: Tensor) -> None:
        """Take in features (B, D) float64 of samples whose outputs are `units` (B,)."""
        more = len(self.context.model.head) - len(self.count)
        self.count = torch.cat((self.count, self.count.new_zeros(more)))
        self.mean = torch.cat((self.mean, self.mean.new_zeros(more, self.mean.shape[1])))
        # as products, whose order of summation is fixed on every device
        member = torch.zeros(len(x), len(self.count), dtype=x.dtype, device=x.device).scatter_(1, units.unsqueeze(1), 1)
        here = member.sum(0)
        mean = member.T @ x / here.clamp(min=1).unsqueeze(1)
        total = self.count + here
        moved = torch.where(here.unsqueeze(1) > 0, mean - self.mean, 0)
        weight = here / total.clamp(min=1)
        self.scattered(x - member @ mean, moved, self.count * weight)
        self.mean = self.mean + moved * weight.unsqueeze(1)
        self.count = total

    def scattered(self, centred: Tensor, moved: Tensor, weight: Tensor) -> None:
        """What a batch adds to sums of squares around the means (Chan, Golub & LeVeque 1979).

        Args:
            centred: features less their class's mean in the batch, (B, D).
            moved: the mean in the batch less the one before, (U, D).
            weight: n m / (n + m) of n samples before and m in the batch, (U,).
        """

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Weights (U, D) and biases (U,) of the outputs, float64."""
        raise NotImplementedError

    def _write(self) -> None:
        """Give the head what the statistics say."""
        weight, bias = self.outputs()
        none = self.count == 0
        weight, bias = weight.masked_fill(none.unsqueeze(1), 0), bias.masked_fill(none, NEVER)
        head = self.context.model.head
        sizes = [len(classes) for classes in head.block_classes]
        for block, w, b in zip(head.blocks, weight.split(sizes), bias.split(sizes), strict=True):
            block.load_state_dict({"weight": w, "bias": b})

    def tensors(self) -> dict[str, Tensor]:
        """The statistics by name."""
        return {"count": self.count, "mean": self.mean}

    def facts(self) -> dict[str, float]:
        held = sum(t.numel() * t.element_size() for t in self.tensors().values())
        return {f"{self.called}/bytes": float(held)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.context.device))
