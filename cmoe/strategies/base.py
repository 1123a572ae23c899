"""The base of all strategies: plain objects that act around an experience and inside the step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.learners.batch import Batch
from cmoe.learners.hooks import StepHooks
from cmoe.learners.model import Model, Output
from cmoe.learners.objective import Objective
from cmoe.moe import ParameterChange, RouteContext
from cmoe.moe.surgery import Surgery
from cmoe.streams import Experience, Stream


@dataclass(frozen=True)
class Segment:
    """What is trained between two rows of the matrix: usually one experience, in a joint run all of them.

    Attributes:
        number: position among the run's segments.
        experiences: their indices.
    """

    number: int
    experiences: tuple[int, ...]

    @property
    def last(self) -> int:
        """The row of the matrix that is evaluated after this segment."""
        return self.experiences[-1]


@dataclass
class Phase:
    """One fit of a segment.

    Attributes:
        name: for logs.
        epochs: passes; None is what the configuration says.
        parameters: what trains; None is everything that requires a gradient.
        loss: replaces the task's loss.
        hooks: whether strategies act inside its steps.
        objective: losses of a batch that is not put through the model, for a phase that trains something else (a
            generator, an autoencoder); `parameters` must say what, and no strategy acts inside its steps.
    """

    name: str = "train"
    epochs: int | None = None
    parameters: Callable[[], Sequence[nn.Parameter]] | None = None
    loss: Callable[[Output, Batch], dict[str, Tensor]] | None = None
    hooks: bool = True
    objective: Callable[[Batch], dict[str, Tensor]] | None = None


@dataclass
class Context:
    """What the runner gives every strategy before the first experience.

    Attributes:
        stream: the experiences.
        model: backbone and head; strategies may change its structure in `before_experience`.
        objective: the task's loss.
        seed: a seed for a named purpose, derived from the run's.
        fresh_model: a newly initialised model of the same configuration, for a named purpose.
        device: where the model is.
        event: reports a change of experts: (kind, layer, expert ids, experience), for 'merged' also `into`.
        options: the run's sections as plain containers.
        changed: tells what became of parameters, so that the optimizer's state follows (`optimizer.reset: never`).
        seen: classes of all segments begun so far, in order of arrival.
        previous: classes of the segments before the present one.
    """

    stream: Stream
    model: Model
    objective: Objective
    seed: Callable[[str], int]
    fresh_model: Callable[[str], Model]
    device: torch.device
    event: Callable[..., None]
    options: dict[str, Any]
    changed: Callable[[ParameterChange], None] = lambda change: None
    seen: list[int] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)

    def record(self, surgery: Surgery, experience: int) -> None:
        """Report what an operation on the model's experts did: its events to the timeline, its parameters to the
        optimizer.

        Args:
            surgery: what a function of `cmoe.moe.surgery` returned.
            experience: during which it was called; whether before or after its training is known.
        """
        for event in surgery.events:
            self.event(event.kind, event.layer, event.experts, experience, into=event.into)
        self.changed(surgery.change)

    def inputs(self, raw: Tensor, experience: Tensor, generator: torch.Generator | None, train: bool = True) -> Tensor:
        """Raw samples (B, ...) of the given experiences (B,) as the model's input, on its device."""
        return self.placed(self.stream.transform(raw, experience, train=train, generator=generator))

    def placed(self, x: Tensor) -> Tensor:
        """Inputs on the model's device, and in its precision unless they are tokens."""
        return x.to(self.device, self._dtype) if x.is_floating_point() else x.to(self.device)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def restart(self, purpose: str) -> None:
        """Draw all weights of the model anew, from a seed of their own; its outputs stay as many as they are."""
        fresh, held = self.fresh_model(purpose), len(self.model.head.blocks)
        begun = len(fresh.head.blocks)
        fresh.restore_structure(self.model.structure())
        with self.seeded(f"{purpose} head"):
            for i in range(begun, held):
                fresh.head.blocks.get_submodule(str(i)).apply(_draw)
        self.model.load_state_dict(fresh.state_dict())

    @contextmanager
    def seeded(self, purpose: str) -> Generator[None]:
        """Initial weights drawn inside come from a seed of their own and leave the global generators alone, so that
        they do not depend on how long training was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(purpose))
            yield

    def route(self, task: int | Tensor | None, training: bool = False) -> RouteContext:
        """The routing context for samples of a task."""
        return RouteContext(task=task, training=training)


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()


class Strategy(StepHooks):
    """Base of all strategies; every method may be left as it is.

    Attributes:
        owns_data: it decides what a segment trains on.
        owns_predict: it has its own decision rule.
        infers_task: with it a run decides without the task label, whatever needs one (`cmoe.strategies.infer_task`).
        owns_loop: it runs the training of an experience itself, and stands alone.
        needs_boundaries: it must know where experiences end.
        extendable: a finished run with it can learn further experiences.
        restructures: it changes which experts the model has, or that it has any, while the run goes on.
    """

    owns_data: ClassVar[bool] = False
    owns_predict: ClassVar[bool] = False
    infers_task: ClassVar[bool] = False
    owns_loop: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = False
    extendable: ClassVar[bool] = True
    restructures: ClassVar[bool] = False

    context: Context

    def setup(self, context: Context) -> None:
        """Called once, before the first experience and again when a run is resumed."""
        self.context = context

    def segments(self, segments: list[Segment]) -> list[Segment]:
        """The run's segments, from those of the stream."""
        return segments

    def data(self, segment: Segment) -> list[Experience] | None:
        """What the segment trains on; None is its own experiences."""
        return None

    def before_experience(self, segment: Segment) -> None:
        """Before a segment's training: add experts, take a snapshot."""

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """The fits of a segment, from those that the strategies before this one want."""
        return phases

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        """Before each fit, also when it is resumed in the middle; must depend on saved state alone."""

    def after_phase(self, segment: Segment, phase: Phase) -> None:
        """After each fit."""

    def after_experience(self, segment: Segment) -> None:
        """After a segment's training: freeze, fill a buffer, estimate importances."""

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        """Logits (B, U) for inputs whose task label is given or None; None leaves the model's own."""
        return None

    def parameters(self) -> int:
        """Weights that predicting needs beside the model's own, for the comparison of sizes."""
        return 0

    def facts(self) -> dict[str, float]:
        """Figures worth tracking after each experience, such as bytes held."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers from which training goes on exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the model already has the structure of that moment."""
