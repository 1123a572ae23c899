"""Rotated MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cmoe.config.types import Positive, PositiveInt
from cmoe.errors import UserError
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class RotatedMNIST(Task):
    """All of MNIST in every experience, turned by the experience's angle (Lopez-Paz & Ranzato 2017).

    Options:
        scenario: 'domain' (the task is unknown), 'task' (its label is given), 'joint' or 'online'.
        experiences: how many angles.
        angles: 'random' (drawn by the run's seed, as in Buzzega et al. 2020), 'even' (0 and equal steps up), or the
            angles in degrees, one for each experience.
        max_angle: random and even angles are below it, in degrees.
    """

    modality: ClassVar[Modality] = "image"
    scenarios: ClassVar[tuple[str, ...]] = ("domain", "task", "joint", "online")

    scenario: Literal["domain", "task", "joint", "online"] = "domain"  # ty: ignore[incompatible-mutable-override] - fewer than the base has
    experiences: PositiveInt = 20
    angles: Literal["random", "even"] | list[float] = "random"
    max_angle: Positive = 180.0

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        import torch

        from cmoe.streams.builders import domain_incremental
        from cmoe.streams.readers import mnist
        from cmoe.streams.seeding import generator
        from cmoe.streams.transforms import Rotate

        n = self.experiences
        if self.angles == "random":
            angles = [self.max_angle * torch.rand(1, generator=generator("angle", seed, i)).item() for i in range(n)]
        elif self.angles == "even":
            angles = [self.max_angle * i / n for i in range(n)]
        elif isinstance(self.angles, str) or len(self.angles) != n:
            given = f"'{self.angles}'" if isinstance(self.angles, str) else f"{len(self.angles)} angles"
            raise UserError(f"stream.angles: expected 'random', 'even' or {n} angles (one an experience), got {given}")
        else:
            angles = list(self.angles)
        train, test = mnist(data)
        names = [f"{angle:.0f} degrees" for angle in angles]
        return domain_incremental(
            self, seed, train=train, test=test, experiences=n, names=names, transform=Rotate(angles)
        )
