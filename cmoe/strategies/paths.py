"""What strategies share that follow the weights through training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Phase, Segment
from cmoe.strategies.quadratic import Quadratic, Weights


class Paths(Quadratic):
    """Base of quadratic penalties whose importances come from the steps of training themselves.

    Attributes:
        whole: the gradients are those that the optimizer gets (penalty included, edited and clipped), instead of those
            of all losses but the own penalty.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.whole = False
        self._followed: list[tuple[str, nn.Parameter]] = []
        self._step: list[tuple[Tensor | None, Tensor]] = []

    def begin(self, name: str, value: Tensor) -> None:
        """A weight is about to be trained; called again before each fit, and when one is resumed in the middle.

        Args:
            name: of the parameter.
            value: its present one, in single precision at least.
        """
        raise NotImplementedError

    def along(self, name: str, gradient: Tensor, step: Tensor, value: Tensor) -> None:
        """A step was made.

        Args:
            name: of the parameter.
            gradient: what the step was made from, in single precision at least, as the others.
            step: the change of the parameter.
            value: the parameter after it.
        """
        raise NotImplementedError

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        super().before_phase(segment, phase)
        self._followed = []
        if not phase.hooks or phase.objective is not None:  # the path is that of the task's training alone
            return
        trained = {id(p) for p in phase.parameters()} if phase.parameters else None
        self._followed = [
            (n, p)
            for n, p in self.context.model.named_parameters()
            if p.requires_grad and (trained is None or id(p) in trained)
        ]
        for name, p in self._followed:
            self.begin(name, precise(p))

    @torch.no_grad()
    def edit_gradients(self) -> None:
        pulls = {} if self.whole else self._pulls()
        self._step = []
        for _, p in self._followed:
            gradient = None
            if p.grad is not None and not self.whole:
                gradient = p.grad - pulls[p] if p in pulls else p.grad.clone()  # clipping works in place
            self._step.append((gradient, p.detach().clone()))

    def _pulls(self) -> dict[nn.Parameter, Tensor]:
        """The penalty's gradients, operation by operation those that the backward pass added to the others."""
        pulls: dict[nn.Parameter, Tensor] = {}
        for p, f, a in self.held():
            pull = self.strength * f * (2 * (p - a))
            pulls[p] = pulls[p] + pull if p in pulls else pull
        return pulls

    @torch.no_grad()
    def after_step(self, batch: Batch, output: Output) -> None:
        for (name, p), (gradient, before) in zip(self._followed, self._step, strict=True):
            gradient = p.grad if self.whole else gradient
            value = precise(p)
            g = torch.zeros_like(value) if gradient is None else precise(gradient)
            self.along(name, g, value - precise(before), value)
        self._step = []

    def present(self) -> Weights:
        """All of the model's weights in single precision at least, also those that are frozen by now."""
        return {n: precise(p) for n, p in self.context.model.named_parameters()}


def precise(tensor: Tensor) -> Tensor:
    """The tensor without its history, in single precision at least: sums of small steps are lost in half precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
