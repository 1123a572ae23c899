"""Maximally interfered retrieval."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cmoe.config.types import Positive, PositiveInt
from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Context, Phase, Segment
from cmoe.strategies.recall import each_loss, recalled_batch
from cmoe.strategies.rehearsal import Rehearsal


class MIR(Rehearsal):
    """Maximally interfered retrieval: replay of the samples that the coming step would harm most (Aljundi et al. 2019).

    https://arxiv.org/abs/1908.04742.
    Of ``candidates`` drawn from the buffer those ``batch`` are replayed whose loss grows most in a trial step on the
    incoming samples: ℓ(θ − lr · ∇L(incoming)) − ℓ(θ). They join the incoming ones in one mean, as in 'replay'.

    Options:
        size: samples that the buffer holds.
        batch: samples replayed at each step; default is the trainer's batch size.
        candidates: samples drawn from the buffer to choose from; default is five times `batch`.
        lr: of the trial step, which is a plain gradient step; default is the optimizer's.
        policy: 'reservoir' (every sample seen equally likely to be held) or 'class_balanced'.
    """

    called: ClassVar[str] = "mir"

    def __init__(
        self,
        size: PositiveInt = 500,
        batch: PositiveInt | None = None,
        candidates: PositiveInt | None = None,
        lr: Positive | None = None,
        policy: Literal["reservoir", "class_balanced"] = "reservoir",
    ) -> None:
        super().__init__(size, batch, policy)
        self.candidates, self.lr = candidates, lr
        self._parameters: list[nn.Parameter] = []

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.among = self.candidates or 5 * self.draw
        if self.among < self.draw:
            raise UserError(
                f"strategy.mir.candidates: expected at least {self.draw}, as many as are replayed, got {self.among}"
            )
        rate = self.lr or context.options["optimizer"].get("lr")
        if not rate:
            raise UserError("strategy.mir.lr: expected a number above 0, as the optimizer has no lr, got none")
        self.rate = float(rate)

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        trained = phase.parameters() if phase.parameters else self.context.model.parameters()
        self._parameters = [p for p in trained if p.requires_grad]

    def extend_batch(self, batch: Batch) -> Batch:
        if not len(self.buffer):
            return batch
        x, y, task = self.recalled(self.buffer.pick(self.among))
        if len(x) > self.draw:
            growth = self.interference(batch, recalled_batch(x, y, task))
            chosen = growth.topk(self.draw).indices
            x, y, task = x[chosen], y[chosen], task[chosen]
        return batch.extended(x, y, task)

    def interference(self, batch: Batch, candidates: Batch) -> Tensor:
        """How much each candidate's loss grows in a trial step on a batch, (M,); leaves the weights as they are."""
        model, parameters = self.context.model, self._parameters
        modes = [(m, m.training) for m in model.modules()]  # 'expand' keeps frozen norms in evaluation mode
        model.eval()  # without dropout, and trials do not count as use of experts
        loss = self.context.objective.loss(self._logits(batch), batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            before = self._each(candidates)
            kept = [p.clone() for p in parameters]
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    p.sub_(g, alpha=self.rate)
            after = self._each(candidates)
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)  # adding the gradient back would round
        for module, mode in modes:
            module.training = mode
        return after - before

    def _each(self, batch: Batch) -> Tensor:
        return each_loss(self.context.objective, self._logits(batch), batch)

    def _logits(self, batch: Batch) -> Tensor:
        return self.context.model(batch.x, self.context.route(batch.task)).logits

    def after_step(self, batch: Batch, output: Output) -> None:
        self.keep(batch)
