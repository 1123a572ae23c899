"""Any native Avalanche strategy on the same stream and model: an oracle and a baseline."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.errors import UserError, nearest
from cmoe.learners.model import Model
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context, Segment, Strategy


class Avalanche(Strategy):
    """A native Avalanche strategy by its class name, trained by Avalanche's own loop.

    Avalanche keeps its state in objects that only a pickle could hold, and cmoe unpickles nothing: a resumed run
    repeats it from the first experience.

    Options:
        strategy: class in `avalanche.training`, such as Naive, Replay, EWC, SynapticIntelligence, GDumb.
        options: further arguments of that class, such as `mem_size: 500`.
    """

    owns_loop: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, strategy: str = "Naive", options: dict[str, Any] | None = None) -> None:
        self.strategy, self.options = strategy, dict(options or {})
        self.native: Any = None

    def setup(self, context: Context) -> None:
        super().setup(context)
        import avalanche.training as training

        names = [n for n, c in vars(training).items() if inspect.isclass(c) and hasattr(c, "train")]
        if self.strategy not in names:
            raise UserError(
                f"strategy avalanche.strategy: expected a class of avalanche.training, got '{self.strategy}'"
                f"{nearest(self.strategy, names)}"
            )
        self._class = getattr(training, self.strategy)
        taken = inspect.signature(self._class.__init__).parameters
        for name in self.options:
            if name not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                raise UserError(f"strategy avalanche.options.{name}: unknown to {self.strategy}{nearest(name, taken)}")

    def train(self, segment: Segment, optimizer: torch.optim.Optimizer) -> None:
        """Train one segment with Avalanche's loop on Avalanche's own experiences."""
        if self.native is None:
            self.native = self._make(optimizer)
        for experience in segment.experiences:
            self.native.train(self.context.stream.benchmark.streams["train"][experience], num_workers=0)

    def _make(self, optimizer: torch.optim.Optimizer) -> Any:
        from avalanche.training.plugins import EvaluationPlugin

        trainer = self.context.options["trainer"]
        model = NativeModel(self.context.model)
        taken = inspect.signature(self._class.__init__).parameters
        arguments: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": trainer["batch_size"],
            "train_epochs": trainer["epochs"],
            "device": self.context.device,
            "evaluator": EvaluationPlugin(),
        }
        chosen = {k: v for k, v in arguments.items() if k in taken} | self.options
        try:
            return self._class(**chosen)
        except (TypeError, ValueError) as error:
            raise UserError(f"strategy avalanche.options: {self.strategy} refuses them ({error})") from error


class NativeModel(nn.Module):
    """Our model as Avalanche calls one: inputs in, logits out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, U) of inputs (B, ...)."""
        return self.model(x, RouteContext(training=self.training)).logits
