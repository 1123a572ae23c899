"""Any native Avalanche strategy on the same stream and model: an oracle and a baseline."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.errors import UserError, first_line, nearest
from cmoe.learners.model import Model
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context, Segment, Strategy

_PLAIN: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


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
                f"strategy.avalanche.strategy: expected a class of avalanche.training, got '{self.strategy}'"
                f"{nearest(self.strategy, names)}"
            )
        self._class = getattr(training, self.strategy)
        self._refuse(context, training)
        taken = _parameters(self._class)
        for name, value in self.options.items():
            key = f"strategy.avalanche.options.{name}"
            if name not in taken:
                raise UserError(f"{key}: unknown to {self.strategy}{nearest(name, taken)}")
            wanted = taken[name].annotation
            # Avalanche keeps any value and fails when it computes with it
            if wanted in _PLAIN and not (
                isinstance(value, _PLAIN[wanted]) and (wanted is bool or not isinstance(value, bool))
            ):
                raise UserError(f"{key}: expected {wanted.__name__} for {self.strategy}, got {value!r}")
        # one on trial, so that what it refuses is known before the run begins
        with torch.random.fork_rng(devices=[]):
            trial = copy.deepcopy(context.model)
            self._make(trial, torch.optim.SGD(trial.parameters(), lr=0.1))

    def _refuse(self, context: Context, training: Any) -> None:
        """What Avalanche's loop cannot be given."""
        stream, head = context.stream, context.model.head
        if stream.language:
            raise UserError("strategy.avalanche: expected a stream with classes, got language modelling")
        if head.kind != "shared":
            raise UserError(
                f"strategy.avalanche: expected model.head 'shared', whose output c is class c, got '{head.kind}'"
            )
        if context.model.needs_task():
            raise UserError("strategy.avalanche: expected a router that needs no task label, Avalanche gives none")
        if issubclass(self._class, training.JointTraining) and len(stream.segments) > 1:
            raise UserError("strategy.avalanche: JointTraining needs stream.scenario 'joint', it trains only once")

    def train(self, segment: Segment, optimizer: torch.optim.Optimizer) -> None:
        """Train one segment with Avalanche's loop on Avalanche's own experiences."""
        if self.native is None:
            self.native = self._make(self.context.model, optimizer)
        train: Any = self.context.stream.benchmark.streams["train"]
        self.native.train(
            [train[experience] for experience in segment.experiences],
            num_workers=0,
            reset_optimizer_state=self.context.options["optimizer"]["reset"] == "experience",
        )
        if self.native.model.model is not self.context.model:  # some, such as GDumb, train a copy
            self.context.model.load_state_dict(self.native.model.model.state_dict())

    def _make(self, ours: Model, optimizer: torch.optim.Optimizer) -> Any:
        from avalanche.training.plugins import EvaluationPlugin

        trainer = self.context.options["trainer"]
        model = NativeModel(ours)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No loggers specified")  # cmoe evaluates and tracks itself
            evaluator = EvaluationPlugin()
        arguments: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": trainer["batch_size"],
            "train_epochs": trainer["epochs"],
            "device": self.context.device,
            "evaluator": evaluator,
        }
        taken = _parameters(self._class)
        chosen = {k: v for k, v in arguments.items() if k in taken} | self.options
        try:
            return self._class(**chosen)
        except Exception as error:  # somebody else's constructor may raise anything, AssertionError included
            raise UserError(
                f"strategy.avalanche.options: {self.strategy} refuses them ({first_line(error)})"
            ) from error


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a class can be made with: its constructor's parameters, and those that `**kwargs` hands to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found = {p.name: p for p in named} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


class NativeModel(nn.Module):
    """Our model as Avalanche calls one: inputs in, logits out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, U) of inputs (B, ...)."""
        return self.model(x, RouteContext(training=self.training)).logits
