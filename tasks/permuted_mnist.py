"""Permuted MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cmoe.config.types import PositiveInt
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class PermutedMNIST(Task):
    """All of MNIST in every experience, each with its own fixed random permutation of the pixels.

    The permutations are drawn by the run's seed, as in Buzzega et al. 2020 (20 tasks) and Goodfellow et al. 2013.

    Options:
        scenario: 'domain' (the task is unknown), 'task' (its label is given), 'joint' or 'online'.
        experiences: how many permutations.
        first_identity: the first experience keeps the pixels where they are.
    """

    modality: ClassVar[Modality] = "image"
    scenarios: ClassVar[tuple[str, ...]] = ("domain", "task", "joint", "online")

    scenario: Literal["domain", "task", "joint", "online"] = "domain"  # ty: ignore[incompatible-mutable-override] - fewer than the base has
    experiences: PositiveInt = 20
    first_identity: bool = False

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        import torch

        from cmoe.streams.builders import domain_incremental
        from cmoe.streams.readers import mnist
        from cmoe.streams.seeding import generator
        from cmoe.streams.transforms import Chain, Permute, Scale

        train, test = mnist(data)
        # a generator for each, so that a longer stream begins like a shorter one
        orders = [torch.randperm(784, generator=generator("permutation", seed, i)) for i in range(self.experiences)]
        if self.first_identity:
            orders[0] = torch.arange(784)
        return domain_incremental(
            self,
            seed,
            train=train,
            test=test,
            experiences=self.experiences,
            names=[f"permutation {i}" for i in range(self.experiences)],
            transform=Chain(Permute(torch.stack(orders)), Scale()),
        )
