"""Which outputs a head has, and when they are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from cmoe.assembly import BYTES, seed_for
from cmoe.backbones.mlp import glorot
from cmoe.config.plan import Plan
from cmoe.learners import Head
from cmoe.learners.head import SHARED
from cmoe.streams import Stream


class Outputs:
    """Gives a model's head the outputs that its kind has at each time.

    Args:
        plan: the run's.
        stream: the run's.
    """

    def __init__(self, plan: Plan, stream: Stream) -> None:
        self.plan, self.stream = plan, stream

    def begin(self, head: Head, purpose: str) -> None:
        """A multi-head gets all its heads: what a task's outputs begin with does not depend on when it comes."""
        if head.kind == "multi":
            self._add_heads(head, range(len(self.stream.experiences)), purpose)

    def grow(
        self,
        head: Head,
        experiences: Sequence[int],
        classes: Iterable[int],
        seeded: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        """Outputs for what a segment brings: always in a growing head, in the others when a run is extended.

        Args:
            head: changed in place.
            experiences: of the segment.
            classes: theirs.
            seeded: a context in which random numbers depend on the given purpose alone.
        """
        if head.kind == "multi":
            self._add_heads(head, experiences, "model")
            return
        wanted = range(BYTES) if self.stream.language else dict.fromkeys(classes)
        new = [c for c in wanted if c not in head.classes]
        if new:
            with seeded(f"head {new}"):
                self._add(head, new)

    def _add_heads(self, head: Head, experiences: Iterable[int], purpose: str) -> None:
        with torch.random.fork_rng(devices=[]):
            for e in experiences:
                if e not in head.tasks:
                    torch.manual_seed(seed_for(self.plan.seed, f"{purpose} head {e}"))
                    self._add(head, range(BYTES) if self.stream.language else self.stream.experiences[e].classes, e)

    def _add(self, head: Head, classes: Iterable[int], task: int = SHARED) -> None:
        block = head.blocks[head.add(list(classes), task)]
        if self.plan.model.get("init") == "xavier":
            block.apply(glorot)
