"""scikit-learn's handwritten digits, class by class."""

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
class SplitDigits(Task):
    """8x8 digits that every installation has (scikit-learn), 1797 images; a fifth of each class is the test set.

    Options:
        experiences: in how many equal groups of classes the digits come; a divisor of 10.
    """

    modality: ClassVar[Modality] = "image"

    experiences: PositiveInt = 5

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        import torch
        from sklearn.datasets import load_digits

        from cmoe.streams.arrays import hold_out
        from cmoe.streams.builders import class_incremental

        digits = load_digits()
        x, y = digits.images.astype("uint8"), torch.from_numpy(digits.target)
        fit, test = hold_out(y, 0.2, "digits test")
        return class_incremental(
            self, seed, train=(x[fit], y[fit]), test=(x[test], y[test]), experiences=self.experiences
        )

    def transform(self) -> BatchTransform:
        from cmoe.streams.transforms import Scale

        return Scale(16)
