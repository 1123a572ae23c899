"""The Avalanche benchmark of a layout: real AvalancheDatasets that index the shared storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmoe.streams.stream import Layout, Split
from cmoe.streams.transforms import BatchTransform

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

_ATTRIBUTE = "_cmoe_layout"


class SampleDataset(Dataset):
    """A split, sample by sample: `dataset[i]` is (raw x, y), or (tokens, next tokens) for language modelling.

    Args:
        split: the samples.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        row = int(self.split.index[index])
        x = self.split.x[row]
        if self.split.y is None:
            tokens = x.to(torch.int64)
            return tokens[:-1], tokens[1:]
        return x, int(self.split.y[row])


@dataclass(frozen=True)
class ItemTransform:
    """A batched transform applied to one raw sample of one experience."""

    transform: BatchTransform
    experience: int
    train: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform(x[None], self.experience, train=self.train, generator=None)[0]


def avalanche_dataset(split: Split, experience: int, task_label: int, transform: BatchTransform, train: bool) -> Any:
    """An AvalancheDataset whose items are (x, y, task label), with the groups 'train' and 'eval'."""
    from avalanche.benchmarks.utils import (
        AvalancheDataset,
        DataAttribute,
        TaskAwareSupervisedClassificationDataset,
        TransformGroups,
    )
    from avalanche.benchmarks.utils.flat_data import ConstantSequence

    tasks = DataAttribute(ConstantSequence(task_label, len(split)), "targets_task_labels", use_in_getitem=True)
    y = split.targets()
    if y is None:
        return AvalancheDataset([SampleDataset(split)], data_attributes=[tasks])
    targets: Any = y.tolist()
    groups = {
        "train": ItemTransform(transform, experience, True),
        "eval": ItemTransform(transform, experience, False),
    }
    return TaskAwareSupervisedClassificationDataset(
        [SampleDataset(split)],
        data_attributes=[DataAttribute(targets, "targets"), tasks],
        transform_groups=TransformGroups(groups, current_group="train" if train else "eval"),
    )


def avalanche_benchmark(layout: Layout, online_size: int) -> CLScenario:
    """The streams `train`, `validation` (where it is not empty) and `test` of a layout, which stays attached.

    In the online scenario `train` holds Avalanche's small online experiences, made as they are asked for.
    """
    from avalanche.benchmarks import CLScenario, DatasetExperience, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.scenarios.generic_scenario import CLStream, EagerCLStream
    from avalanche.benchmarks.scenarios.online import split_online_stream

    streams: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        splits = [getattr(e, name) for e in layout.experiences]
        if not all(map(len, splits)):
            continue
        made = [
            DatasetExperience(dataset=avalanche_dataset(s, e.index, e.task_label, layout.transform, name == "train"))
            for s, e in zip(splits, layout.experiences, strict=True)
        ]
        stream = EagerCLStream(name, made)
        if layout.experiences[0].train.y is not None:
            stream = with_classes_timeline(stream)
        streams[name] = with_task_labels(stream)
    if layout.experiences[0].parts is not None:
        small = split_online_stream(streams["train"], online_size, shuffle=False, access_task_boundaries=True, seed=0)
        streams["train"] = CLStream("train", small.exps_iter)
    benchmark = CLScenario(list(streams.values()))
    setattr(benchmark, _ATTRIBUTE, layout)
    return benchmark


def layout_of(benchmark: CLScenario) -> Layout | None:
    """The layout that a builder of ours attached, or None for a foreign benchmark."""
    return getattr(benchmark, _ATTRIBUTE, None)
