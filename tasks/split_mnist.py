"""Split MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cmoe.config.types import PositiveInt
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class SplitMNIST(Task):
    """MNIST's digits in pairs (0,1), (2,3), ...; pixels in [0, 1] (Zenke et al. 2017).

    Options:
        experiences: in how many equal groups of classes the digits come; a divisor of 10.
    """

    modality: ClassVar[Modality] = "image"

    experiences: PositiveInt = 5

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.builders import class_incremental
        from cmoe.streams.readers import mnist

        train, test = mnist(data)
        return class_incremental(self, seed, train=train, test=test, experiences=self.experiences)
