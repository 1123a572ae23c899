"""Split CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cmoe.config.types import PositiveInt
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder
    from cmoe.streams.transforms import BatchTransform


@dataclass
class SplitCIFAR100(Task):
    """CIFAR-100's fine classes in groups, 32x32 colour images (Krizhevsky 2009).

    Options:
        experiences: in how many equal groups the classes come; a divisor of 100.
        augment: random crops (4 pixels) and flips in training.
        normalise: subtract the training set's channel means and divide by their deviations; else pixels in [0, 1].
    """

    modality: ClassVar[Modality] = "image"

    experiences: PositiveInt = 10
    augment: bool = True
    normalise: bool = True

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.builders import class_incremental
        from cmoe.streams.readers import cifar100

        train, test, names = cifar100(data)
        return class_incremental(self, seed, train=train, test=test, experiences=self.experiences, class_names=names)

    def transform(self) -> BatchTransform:
        from cmoe.streams.transforms import Augment, Chain, Scale

        scale = Scale(255, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)) if self.normalise else Scale()
        return Chain(Augment(padding=4), scale) if self.augment else scale
