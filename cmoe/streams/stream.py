"""What a stream is once it is opened: raw tensors stored once, and index maps into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.task import Modality, Scenario
    from cmoe.streams.transforms import BatchTransform


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Some samples of a raw storage that many splits share.

    Attributes:
        x: (N, ...) the storage: uint8 or float32 images and vectors, int32 or int16 token ids.
        index: (n,) int64, this split's rows of `x`.
        y: (N,) int64 labels aligned with `x`; None for language modelling, whose targets are the tokens themselves.
    """

    x: Tensor
    index: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return self.index.shape[0]

    def raw(self) -> Tensor:
        """The samples, (n, ...), as stored."""
        return self.x.index_select(0, self.index)

    def targets(self) -> Tensor | None:
        """The labels, (n,), or None for language modelling."""
        return None if self.y is None else self.y.index_select(0, self.index)

    def subset(self, positions: Tensor) -> Split:
        """The samples at these positions of this split, (m,) int64; the storage is shared."""
        return Split(self.x, self.index.index_select(0, positions), self.y)


@dataclass(frozen=True, eq=False)
class Experience:
    """One stop of the stream.

    Attributes:
        index: its place in the stream.
        name: for tables.
        task_label: Avalanche's: the index where the label is given (task scenario, attributes), else 0.
        classes: the classes that it brings, in the order of the class order.
        train: samples to learn from; in the online scenario in order of arrival.
        validation: samples to choose hyper-parameters by; may be empty.
        test: samples to report.
        parts: online: how many training samples each small experience has, in order.
    """

    index: int
    name: str
    task_label: int
    classes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    parts: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """All that a builder knows; it travels on the benchmark, so that opening it again copies nothing.

    Attributes: as in `Stream`.
    """

    modality: Modality
    scenario: Scenario
    experiences: list[Experience]
    segments: list[tuple[int, ...]]
    transform: BatchTransform
    class_names: tuple[str, ...] = ()
    vocabulary: int | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """A task plugin's benchmark, opened.

    Attributes:
        name: the task's.
        modality: 'image', 'vector', 'text' (classified) or 'bytes' (language modelling).
        scenario: as configured.
        input_shape: one sample after the transform, without the batch dimension.
        n_classes: labels are 0 .. n_classes-1; 0 for language modelling.
        class_names: one for each class.
        vocabulary: how many token ids there are; None for images and vectors.
        experiences: in order; `limit` does not shorten it.
        segments: the experiences trained together; one holding all in the joint scenario.
        transform: raw batch -> model input.
        fingerprint: sha256 of data, indices, labels and definition.
        benchmark: the Avalanche benchmark, for native strategies.
        prefixes: fingerprints of the shorter streams that this one continues (see `cmoe.streams.join`).
    """

    name: str
    modality: Modality
    scenario: Scenario
    input_shape: tuple[int, ...]
    n_classes: int
    class_names: tuple[str, ...]
    vocabulary: int | None
    experiences: list[Experience]
    segments: list[tuple[int, ...]]
    transform: BatchTransform
    fingerprint: str
    benchmark: CLScenario = field(repr=False)
    prefixes: tuple[str, ...] = ()

    @property
    def language(self) -> bool:
        """Whether the tokens are their own targets."""
        return self.experiences[0].train.y is None

    @property
    def many_labels(self) -> bool:
        """Whether every sample has a label in each experience (attributes): only the task label tells which is meant."""
        first, *others = self.experiences
        return bool(others) and all(
            e.classes != first.classes and e.test.x is first.test.x and torch.equal(e.test.index, first.test.index)
            for e in others
        )


def model_input(split: Split, experience: int, transform: BatchTransform) -> tuple[int, ...]:
    """Shape of one sample as the model gets it."""
    x = transform(split.x[:1], experience, train=False, generator=None)
    return tuple(x.shape[1:]) if split.y is not None else (x.shape[1] - 1,)


def no_rows() -> Tensor:
    """The index of an empty split."""
    return torch.empty(0, dtype=torch.int64)
