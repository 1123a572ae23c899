"""Task inference by an autoencoder of each task: Expert Gate."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cmoe.config.types import Positive, PositiveInt
from cmoe.learners.batch import Batch
from cmoe.strategies.base import Phase, Segment
from cmoe.strategies.infer_task import Answer, InferTask
from cmoe.strategies.teacher import as_it_is


class InferAutoencoder(InferTask):
    """The task label is that of the autoencoder that reconstructs a sample best (Expert Gate, Aljundi et al. 2017).

    https://arxiv.org/abs/1611.06194. After each experience an undercomplete autoencoder, a hidden layer with ReLU, is
    trained on its samples to the least mean squared error, in a phase of its own with the run's optimizer. log p(t | x) is
    minus the error over the temperature. What is looked at is standardised by the mean and deviation of the first
    experience. The answer itself stays the network's: with `expand` this is Expert Gate but for its choice between
    fine-tuning and distillation by relatedness, which is tracked (`infer_autoencoder/relatedness`).

    Options:
        hidden: units of the hidden layer.
        epochs: passes over an experience.
        on: 'inputs', or 'features' of the network as it was after the first experience.
        temperature: of the softmax over errors; 2 in the paper.
        decide: the 'best' experience's answer, or 'all' answers weighted by their probabilities.
    """

    called: ClassVar[str] = "infer_autoencoder"

    def __init__(
        self,
        hidden: PositiveInt = 100,
        epochs: PositiveInt = 5,
        on: Literal["inputs", "features"] = "inputs",
        temperature: Positive = 2.0,
        decide: Literal["best", "all"] = "best",
    ) -> None:
        super().__init__(on, decide)
        self.hidden, self.epochs, self.temperature = hidden, epochs, temperature
        self.autoencoders: dict[int, nn.Sequential] = {}
        self.shift: Tensor | None = None
        self.scale: Tensor | None = None
        self.related = float("nan")

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """One more for each segment: its autoencoders, all of whose experiences come mixed in a joint run."""

        def parameters() -> list[nn.Parameter]:
            return [p for e in segment.experiences for p in self._of(e).parameters()]

        return [*phases, Phase("autoencoder", self.epochs, parameters, objective=self._objective)]

    def _prepare(self, experience: int) -> None:
        """What is looked at, and its scale, are fixed when the first autoencoder is made."""
        if self.on == "features" and self.network is None:
            self.network = as_it_is(self.context)
        if self.shift is None:
            x_ND, _ = self._seen(experience)
            self.shift, self.scale = x_ND.mean(0), x_ND.std(0).clamp(min=1e-2)

    def _of(self, experience: int) -> nn.Sequential:
        if experience not in self.autoencoders:
            self._prepare(experience)
            assert self.shift is not None
            with self.context.seeded(f"autoencoder {experience}"):
                made = self._new(len(self.shift))
            self.autoencoders[experience] = made.to(self.context.device, torch.float32)
        return self.autoencoders[experience]

    def _new(self, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, width))

    def _standardised(self, x: Tensor) -> Tensor:
        assert self.shift is not None
        assert self.scale is not None
        return ((self.looked_at(x) - self.shift) / self.scale).float()

    def _objective(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            x_BD = self._standardised(batch.x)
        tasks = [batch.task] if isinstance(batch.task, int) else batch.task.unique().tolist()
        total = x_BD.new_zeros(())
        for task in tasks:
            own = x_BD if isinstance(batch.task, int) else x_BD[batch.task == task]
            total = total + (self._of(task)(own) - own).square().mean(1).sum()
        return {"autoencoder": total / len(x_BD)}

    @torch.no_grad()
    def learn(self, experience: int, x_ND: Tensor, y_N: Tensor) -> None:
        """How near the nearest known experience is: 1 − (error of its autoencoder − own error) / own error."""
        self._of(experience).requires_grad_(False)
        if not self.known:
            return
        assert self.shift is not None
        assert self.scale is not None
        x = ((x_ND - self.shift) / self.scale).float()
        errors = {e: float((self._of(e)(x) - x).square().mean()) for e in (*self.known, experience)}
        mine = max(errors.pop(experience), 1e-12)
        self.related = max(1 - (error - mine) / mine for error in errors.values())

    def scores(self, x: Tensor, answer: Answer) -> Tensor:
        x_BD = self._standardised(x)
        errors = [(self._of(e)(x_BD) - x_BD).square().mean(1) for e in self.known]
        return -torch.stack(errors, 1).double() / self.temperature

    def tensors(self) -> list[Tensor]:
        own = [p for a in self.autoencoders.values() for p in a.parameters()]
        return [*own, *(t for t in (self.shift, self.scale) if t is not None)]

    def facts(self) -> dict[str, float]:
        related = {} if self.related != self.related else {f"{self.called}/relatedness": self.related}
        return super().facts() | related

    def state_dict(self) -> dict[str, Any]:
        held = {e: {n: w.detach() for n, w in a.state_dict().items()} for e, a in self.autoencoders.items()}
        more = {"autoencoders": held, "shift": self.shift, "scale": self.scale, "related": self.related}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.context.device
        self.shift, self.scale = (None if state[k] is None else state[k].to(device) for k in ("shift", "scale"))
        self.related = state["related"]
        self.autoencoders = {}
        for e, weights in state["autoencoders"].items():
            assert self.shift is not None
            made = self._new(len(self.shift))
            made.load_state_dict(weights)
            self.autoencoders[e] = made.to(device).requires_grad_(e not in self.known)
