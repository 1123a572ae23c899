"""Opening a task plugin's benchmark: ours copies nothing, anybody else's is read out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.streams.arrays import hold_out, named
from cmoe.streams.assemble import arrival, check_scenario, default_transform, part_sizes, segments_of
from cmoe.streams.data import DataFolder
from cmoe.streams.fingerprint import fingerprint
from cmoe.streams.seeding import global_rng_kept
from cmoe.streams.stream import Experience, Layout, Split, Stream, model_input
from cmoe.streams.task import Modality, Task
from cmoe.streams.view import layout_of


def open_stream(spec: Mapping[str, Any], task: type[Any], data: DataFolder, seed: int) -> Stream:
    """Open the stream that a configuration names. The global random generators stay as they are.

    Args:
        spec: `name` and the options of the task.
        task: its class, derived from `Task`.
        data: where data sets are looked for.
        seed: the run's.

    Raises:
        UserError: wrong options, data that is not there, or a plugin that fails or returns no benchmark.
    """
    name = str(spec.get("name", task.__name__))
    try:
        with global_rng_kept(seed):
            plugin: Task = task(**{k: v for k, v in spec.items() if k != "name"})
            check_scenario(plugin)
            benchmark = plugin.benchmark(data, seed)
            layout = _layout(plugin, benchmark, seed)
            first = layout.experiences[0]
            shape = model_input(first.train, first.index, layout.transform)
    except UserError as error:
        raise UserError(f"task {name}: {error}") from error
    except Exception as error:
        raise UserError(f"task {name}: benchmark() failed: {type(error).__name__}: {_line(error)}") from error
    return Stream(
        name=name,
        modality=layout.modality,
        scenario=layout.scenario,
        input_shape=shape,
        n_classes=len(layout.class_names),
        class_names=layout.class_names,
        vocabulary=layout.vocabulary,
        experiences=layout.experiences,
        segments=layout.segments,
        transform=layout.transform,
        fingerprint=fingerprint(layout),
        benchmark=benchmark,
    )


def _layout(plugin: Task, benchmark: Any, seed: int) -> Layout:
    streams = getattr(benchmark, "streams", None)
    if not isinstance(streams, Mapping):
        raise UserError(f"benchmark() must return an Avalanche benchmark, got {type(benchmark).__name__}")
    return layout_of(benchmark) or _foreign(plugin, streams, seed)


def _foreign(plugin: Task, streams: Mapping[str, Any], seed: int) -> Layout:
    """Read out a benchmark that no builder of ours made; its transforms are applied here, once and for all."""
    if not {"train", "test"} <= set(streams):
        raise UserError(f"the benchmark needs the streams 'train' and 'test', it has {', '.join(sorted(streams))}")
    train, parts = _small_together(list(streams["train"]))
    test = list(streams["test"])
    held = list(streams["validation"]) if "validation" in streams else []
    # one test set for all: new instances of the same classes
    if not train or len(test) not in (1, len(train)) or (held and len(held) != len(train)):
        raise UserError(f"the benchmark has {len(train)} training and {len(test)} test experiences; expected as many")
    x, y, counts, tasks = _read(
        [[e.dataset] if not isinstance(e, list) else [s.dataset for s in e] for e in train + held]
    )
    x_test, y_test, counts_test, _ = _read([[e.dataset] for e in test])
    facts = plugin.describe()
    modality = cast(Modality, facts.get("modality", plugin.modality))
    starts, starts_test = [0, *np.cumsum(counts).tolist()], [0, *np.cumsum(counts_test).tolist()]
    names = named(facts.get("names"), len(train), "experience ")
    experiences = []
    for i in range(len(train)):
        rows = torch.arange(starts[i], starts[i + 1])
        if held:
            keep, validation = rows, torch.arange(starts[len(train) + i], starts[len(train) + i + 1])
        else:
            keep, validation = hold_out(y, 0.0 if parts[i] else plugin.validation, among=rows)
        sizes = parts[i]
        if plugin.scenario == "online" and sizes is None:
            keep, sizes = arrival(keep, seed, i), part_sizes(len(keep), plugin.online_size)
        own = y.index_select(0, rows)
        t = i if len(test) > 1 else 0
        experiences.append(
            Experience(
                index=i,
                name=names[i],
                task_label=tasks[i],
                classes=tuple(torch.unique(own).tolist()),
                train=Split(x, keep, y),
                validation=Split(x, validation, y),
                test=Split(x_test, torch.arange(starts_test[t], starts_test[t + 1]), y_test),
                parts=sizes,
            )
        )
    n_classes = 1 + int(max(y.max(), y_test.max()))
    return Layout(
        modality=modality,
        scenario=plugin.scenario,
        experiences=experiences,
        segments=segments_of(plugin, len(experiences)),
        transform=default_transform(plugin, modality),
        class_names=named(facts.get("class_names"), n_classes, ""),
        vocabulary=facts.get("vocabulary"),
    )


def _small_together(train: list[Any]) -> tuple[list[Any], list[tuple[int, ...] | None]]:
    """Experiences of an online stream, grouped by the experience that each was cut from, and their sizes."""
    if not train or not hasattr(train[0], "origin_experience"):
        return train, [None] * len(train)
    groups: list[list[Any]] = []
    for small in train:
        if groups and groups[-1][0].origin_experience is small.origin_experience:
            groups[-1].append(small)
        else:
            groups.append([small])
    return groups, [tuple(len(s.dataset) for s in group) for group in groups]


def _read(experiences: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """All samples of all experiences in one storage, their labels, and each experience's size and task label."""
    counts = [sum(map(len, datasets)) for datasets in experiences]
    y = torch.empty(sum(counts), dtype=torch.int64)
    x: Tensor | None = None
    tasks, row = [], 0
    for datasets in experiences:
        label = 0
        for dataset in datasets:
            for i in range(len(dataset)):
                sample, target, *rest = dataset[i]
                value = _tensor(sample)
                if x is None:
                    x = torch.empty((sum(counts), *value.shape), dtype=value.dtype)
                if value.shape != x.shape[1:] or value.dtype != x.dtype:
                    raise UserError(
                        f"samples differ: {tuple(x.shape[1:])} {x.dtype} and {tuple(value.shape)} {value.dtype}"
                    )
                x[row], y[row] = value, _label(target)
                label = int(rest[0]) if rest else 0
                row += 1
        tasks.append(label)
    if x is None:
        raise UserError("the benchmark has no samples")
    return x, y, counts, tasks


def _tensor(sample: Any) -> Tensor:
    if isinstance(sample, Tensor):
        return sample if sample.dtype != torch.float64 else sample.to(torch.float32)
    try:
        array = np.array(sample)  # a PIL image or a numpy array
    except Exception as error:
        raise UserError(f"expected samples as tensors, arrays or images, got {type(sample).__name__}") from error
    if array.dtype.kind not in "buif":
        raise UserError(f"expected samples as tensors, arrays or images, got {type(sample).__name__}")
    if array.dtype == np.uint8 and array.ndim in (2, 3) and not isinstance(sample, np.ndarray):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))


def _label(target: Any) -> int:
    try:
        return int(target)
    except (TypeError, ValueError) as error:
        raise UserError(f"expected an integer class label a sample, got {type(target).__name__}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
