"""Split Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cmoe.config.types import PositiveInt
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass
class SplitFashionMNIST(Task):
    """Fashion-MNIST's ten kinds of clothing in groups; pixels in [0, 1] (Xiao et al. 2017).

    Options:
        experiences: in how many equal groups the classes come; a divisor of 10.
    """

    modality: ClassVar[Modality] = "image"

    experiences: PositiveInt = 5

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.builders import class_incremental
        from cmoe.streams.readers import mnist

        train, test = mnist(data, "FashionMNIST")
        return class_incremental(self, seed, train=train, test=test, experiences=self.experiences, class_names=NAMES)
