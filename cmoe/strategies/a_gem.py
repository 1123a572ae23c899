"""Averaged gradient episodic memory."""

from __future__ import annotations

from typing import ClassVar

from cmoe.config.types import PositiveInt
from cmoe.strategies.base import Context
from cmoe.strategies.flat import flat, product, put
from cmoe.strategies.memories import Memories


class AGEM(Memories):
    """Averaged gradient episodic memory: no step raises the mean loss on the memory, to first order (Chaudhry 2019).

    https://arxiv.org/abs/1812.00420.
    With the batch's gradient g and the gradient r on samples drawn from the memories of all earlier experiences, g
    becomes g − (gᵀr / rᵀr) r where gᵀr < 0. Each experience leaves size / experiences samples.

    Options:
        size: samples of all experiences together.
        batch: samples drawn at each step; default is the trainer's batch size.
    """

    called: ClassVar[str] = "a_gem"
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 500, batch: PositiveInt | None = None) -> None:
        super().__init__(size)
        self.batch = batch

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.draw = self.batch or int(context.options["trainer"]["batch_size"])

    def edit_gradients(self) -> None:
        if not len(self):
            return
        reference = self.reference(self.recalled(self.random(self.draw)))
        present = flat([p.grad for p in self._parameters], self._parameters)
        along = product(present, reference)
        if along < 0:  # so the reference is not zero
            put(present - along / product(reference, reference) * reference, self._parameters)
