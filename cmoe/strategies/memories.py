"""What strategies with a memory of each finished experience share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.flat import gradient
from cmoe.strategies.recall import recalled_batch


class Memories(Strategy):
    """Base of strategies that keep raw samples of each experience once it is learned, drawn at random.

    Attributes:
        called: its name in a configuration, for errors and figures.
        with_classes: it cannot work on language modelling, whose samples have no class.
        held: 'x' raw samples (M, ...), 'y' (M,) classes and 'experience' (M,); the samples of one experience lie
            together, in random order. A strategy may hold more of each sample.

    Args:
        size: samples of all experiences together.
    """

    called: ClassVar[str]
    with_classes: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[str, Tensor] = {}
        self._parameters: list[nn.Parameter] = []

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language and self.with_classes:
            raise UserError(f"strategy.{self.called}: expected a stream with classes, got language modelling")
        limit = context.options["stream"]["limit"] or len(context.stream.experiences)
        self.experiences = min(limit, len(context.stream.experiences))
        if self.size < self.experiences:
            raise UserError(
                f"strategy.{self.called}.size: expected at least {self.experiences}, a sample of each experience, "
                f"got {self.size}"
            )
        self.generator = torch.Generator().manual_seed(context.seed(self.called))

    def share(self, learned: int) -> int:
        """Samples that each experience may keep when `learned` are over: an equal part for each of the stream."""
        return self.size // max(self.experiences, learned)

    def extra(self, x: Tensor, y: Tensor, experience: int) -> dict[str, Tensor]:
        """What else to keep of raw samples (M, ...) of an experience that is just over."""
        return {}

    def __len__(self) -> int:
        return len(self.held["experience"]) if self.held else 0

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        trained = phase.parameters() if phase.parameters else self.context.model.parameters()
        self._parameters = [p for p in trained if p.requires_grad]

    def after_experience(self, segment: Segment) -> None:
        """Keep samples of the segment's experiences, and of the earlier ones no more than the present share."""
        known = set(self.held["experience"].tolist()) if self.held else set()
        new = [e for e in segment.experiences if e not in known]
        share = self.share(len(known) + len(new))
        parts = []
        for e in sorted(known):
            rows = self.rows(e)[:share]
            parts.append({name: values.index_select(0, rows) for name, values in self.held.items()})
        parts += [self._chosen(e, share) for e in new]
        self.held = self.joined(parts)

    def joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The memories of several experiences as one."""
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chosen(self, experience: int, share: int) -> dict[str, Tensor]:
        """`share` random training samples of an experience."""
        split = self.context.stream.experiences[experience].train
        chosen = split.subset(torch.randperm(len(split), generator=self.generator)[:share])
        x, y = chosen.raw(), chosen.targets()
        if y is None:  # the targets are the tokens themselves
            y = torch.zeros(len(x), dtype=torch.int64)
        where = torch.full((len(x),), experience)
        return {"x": x, "y": y, "experience": where, **self.extra(x, y, experience)}

    def rows(self, experience: int) -> Tensor:
        """Where the samples of an experience lie, (m,)."""
        return (self.held["experience"] == experience).nonzero().flatten()

    def recalled(self, rows: Tensor) -> Batch:
        """Held samples (M,) as the model gets them."""
        raw, experience = self.held["x"].index_select(0, rows), self.held["experience"].index_select(0, rows)
        x = self.context.inputs(raw, experience, self.generator)
        y = self.held["y"].index_select(0, rows).to(x.device)
        if self.context.stream.language:
            x, y = x[:, :-1], x[:, 1:]
        return recalled_batch(x, y, experience.to(x.device))

    def random(self, count: int) -> Tensor:
        """`count` random rows without replacement; all when fewer are held."""
        return torch.randperm(len(self), generator=self.generator)[:count]

    def reference(self, batch: Batch) -> Tensor:
        """The gradient of the task's loss on recalled samples by the phase's parameters, (P,)."""
        context = self.context
        output = context.model(batch.x, context.route(batch.task, training=True))
        return gradient(context.objective.loss(output.logits, batch), self._parameters)

    def facts(self) -> dict[str, float]:
        held = sum(t.numel() * t.element_size() for t in self.held.values())
        return {f"{self.called}/samples": float(len(self)), f"{self.called}/bytes": float(held)}

    def state_dict(self) -> dict[str, Any]:
        return {"held": dict(self.held), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = dict(state["held"])
        self.generator.set_state(state["generator"])
