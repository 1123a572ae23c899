"""Learning-rate schedules: a factor as a function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmoe.config.types import Count, PositiveInt, Probability


@dataclass
class Constant:
    """The learning rate stays."""

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0) of `steps`."""
        return 1.0


@dataclass
class Cosine:
    """Cosine decay (Loshchilov & Hutter 2017) over each experience, after a linear warm-up.

    Options:
        warmup: steps over which the rate rises linearly from 0.
        floor: share of the learning rate that is left at the end.
    """

    warmup: Count = 0
    floor: Probability = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass
class LinearWarmup:
    """A linear rise over the first steps of each experience, then constant.

    Options:
        warmup: steps over which the rate rises linearly from 0.
    """

    warmup: PositiveInt = 100

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0) of `steps`."""
        return min(1.0, (step + 1) / self.warmup)


@dataclass
class Step:
    """Multiplied by `gamma` after each of `milestones`, shares of each experience's steps.

    Options:
        milestones: shares of the experience's steps, each between 0 and 1.
        gamma: factor at each milestone.
    """

    milestones: tuple[Probability, ...] = (0.5, 0.75)
    gamma: Probability = 0.1

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0) of `steps`."""
        return self.gamma ** sum(step >= m * steps for m in self.milestones)


SchedulerOptions = Constant | Cosine | LinearWarmup | Step
