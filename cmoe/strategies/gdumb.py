"""Greedy sampler and dumb learner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.streams import Experience


class GDumb(Strategy):
    """GDumb: at each experience a fresh network learns from a balanced memory alone (Prabhu et al. 2020).

    https://doi.org/10.1007/978-3-030-58536-5_31.
    A sample is taken in where its class has fewer than size / classes met samples in memory; into a full memory it
    comes in the place of a random sample of the largest class. Then all weights are drawn anew and trained on the
    memory. Epochs, rates and augmentation are the configuration's: the paper's schedule and CutMix are not part of it.

    Options:
        size: samples of the memory.
    """

    owns_data: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 500) -> None:
        self.size = size
        self.members: dict[int, list[tuple[int, int]]] = {}  # class -> (experience, row of the storage) of each sample

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language:
            raise UserError("strategy.gdumb: expected a stream with classes, got language modelling")
        if any(s["name"] == "expand" for s in context.options["strategy"]):
            raise UserError("strategy.gdumb: expected no 'expand' beside it, it would draw frozen experts anew, got it")
        self.generator = torch.Generator().manual_seed(context.seed("gdumb"))

    def before_experience(self, segment: Segment) -> None:
        for e in segment.experiences:
            self._take_in(self.context.stream.experiences[e])
        if segment.number > 0:
            self.context.restart(f"gdumb {segment.number}")

    def _take_in(self, experience: Experience) -> None:
        """The samples of an experience, in a random order."""
        split = experience.train
        y = split.targets()
        assert y is not None
        order = torch.randperm(len(split), generator=self.generator)
        held = len(self)
        draws = torch.rand(len(split), generator=self.generator, dtype=torch.float64).tolist()
        rows, labels = split.index[order].tolist(), y[order].tolist()
        for row, label, draw in zip(rows, labels, draws, strict=True):
            mine = self.members.setdefault(label, [])
            if len(mine) >= self.size / len(self.members):
                continue
            if held == self.size:
                largest = max(self.members.values(), key=len)
                largest.pop(int(draw * len(largest)))
            else:
                held += 1
            mine.append((experience.index, row))

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def data(self, segment: Segment) -> list[Experience]:
        """The memory, as the experiences that its samples are from."""
        rows: dict[int, list[int]] = {}
        for members in self.members.values():
            for experience, row in members:
                rows.setdefault(experience, []).append(row)
        made = []
        for e in sorted(rows):
            experience = self.context.stream.experiences[e]
            kept = replace(experience.train, index=torch.tensor(sorted(rows[e]), dtype=torch.int64))
            made.append(replace(experience, train=kept))
        return made

    def facts(self) -> dict[str, float]:
        sample = self.context.stream.experiences[0].train.x[0]
        each = sample.numel() * sample.element_size() + 16  # with its class and experience
        return {"gdumb/samples": float(len(self)), "gdumb/bytes": float(len(self) * each)}

    def state_dict(self) -> dict[str, Any]:
        members = {c: [list(m) for m in members] for c, members in self.members.items()}
        return {"members": members, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.members = {c: [(m[0], m[1]) for m in members] for c, members in state["members"].items()}
        self.generator.set_state(state["generator"])
