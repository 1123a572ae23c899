"""Three questions about the same digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder
    from cmoe.streams.transforms import BatchTransform


@dataclass
class DigitAttributes(Task):
    """scikit-learn's digits with three labelings: which digit, odd or even, above four; trained jointly by default.

    Options:
        scenario: 'joint' (multi-task learning, all three at once), 'task' (one after the other) or 'online'; the task
            label is always given.
    """

    modality: ClassVar[Modality] = "image"
    scenarios: ClassVar[tuple[str, ...]] = ("joint", "task", "online")

    scenario: Literal["joint", "task", "online"] = "joint"  # ty: ignore[incompatible-mutable-override] - fewer than the base has

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        import torch
        from sklearn.datasets import load_digits

        from cmoe.streams.arrays import hold_out
        from cmoe.streams.builders import attributes

        digits = load_digits()
        x, y = digits.images.astype("uint8"), torch.from_numpy(digits.target)
        fit, test = hold_out(y, 0.2, "digits test")
        train_labels, test_labels = (
            {"digit": y[rows], "parity": y[rows] % 2, "above_four": (y[rows] > 4).long()} for rows in (fit, test)
        )
        names = {"digit": [str(i) for i in range(10)], "parity": ["even", "odd"], "above_four": ["no", "yes"]}
        return attributes(self, seed, train=(x[fit], train_labels), test=(x[test], test_labels), class_names=names)

    def transform(self) -> BatchTransform:
        from cmoe.streams.transforms import Scale

        return Scale(16)
