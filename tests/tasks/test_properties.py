"""What holds for the stream of every built-in task."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmoe.streams import BatchScheduler, Split, Stream, data_folder, evaluation_batches, open_stream

from .conftest import CATALOGUE, OPTIONS, ROOT

Opened = Callable[..., Stream]


def targets(split: Split) -> list[int]:
    y = split.targets()
    assert y is not None
    return y.tolist()


def test_every_task_file_is_tested() -> None:
    assert {p.stem for p in (ROOT / "tasks").glob("*.py")} == set(OPTIONS) == set(CATALOGUE.entries("task"))


def test_train_validation_and_test_are_disjoint(stream: Stream) -> None:
    for a in stream.experiences:
        for b in stream.experiences:
            assert a.train.x is b.train.x is b.validation.x
            assert a.test.x is not a.train.x
            assert not set(a.train.index.tolist()) & set(b.validation.index.tolist())


def test_every_sample_is_there_exactly_once(stream: Stream) -> None:
    shared = stream.scenario in ("domain", "joint") and not stream.language
    groups = [[e] for e in stream.experiences] if shared else [stream.experiences]
    for group in groups:
        train = torch.cat([s.index for e in group for s in (e.train, e.validation)])
        test = torch.cat([e.test.index for e in group])
        assert torch.equal(train.sort().values, torch.arange(len(group[0].train.x)))
        assert torch.equal(test.sort().values, torch.arange(len(group[0].test.x)))


def test_classes_are_as_declared(stream: Stream) -> None:
    assert stream.n_classes == len(stream.class_names)
    for e in stream.experiences:
        if stream.language:
            assert e.classes == ()
            continue
        for split in (e.train, e.validation, e.test):
            assert set(targets(split)) == set(e.classes)


def test_validation_has_its_share_of_each_class(stream: Stream) -> None:
    if stream.language or stream.name == "clinc150":  # which has an official one
        return
    for e in stream.experiences:
        fit, held = Counter(targets(e.train)), Counter(targets(e.validation))
        # the labelings of digit_attributes are held out together, so their shares round several times
        assert all(abs(held[c] - 0.1 * (fit[c] + held[c])) <= 1 + 0.01 * fit[c] for c in e.classes)


def test_shapes_and_types(stream: Stream) -> None:
    e = stream.experiences[-1]
    batch = next(evaluation_batches(e.test, e.index, stream.transform, 16))
    assert tuple(batch.x.shape[1:]) == stream.input_shape
    assert batch.x.dtype == (torch.int64 if stream.modality in ("text", "bytes") else torch.float32)
    if stream.modality == "image":
        assert (stream.transform(e.train.x[:500], e.index, train=False).abs() <= 3).all()
    if stream.vocabulary is not None:
        assert int(batch.x.min()) >= 0
        assert int(batch.x.max()) < stream.vocabulary


def test_avalanche_items_are_the_transformed_samples(stream: Stream) -> None:
    for name in ("train", "validation", "test"):
        for e, foreign in zip(stream.experiences, stream.benchmark.streams[name], strict=True):
            split, dataset = getattr(e, name), foreign.dataset
            assert len(dataset) == len(split)
            x = stream.transform(split.x.index_select(0, split.index[:40]), e.index, train=False)
            for i in range(0, min(40, len(split)), 7):
                item, y, task = dataset[i]
                if stream.language:
                    assert torch.equal(item, x[i, :-1])
                    assert torch.equal(y, x[i, 1:])
                else:
                    assert torch.equal(item, x[i])
                    assert y == dataset.targets[i] == targets(split)[i]
                assert task == e.task_label


def test_avalanche_knows_the_classes_and_task_labels(stream: Stream) -> None:
    for e, foreign in zip(stream.experiences, stream.benchmark.streams["train"], strict=True):
        assert foreign.task_label == e.task_label
        assert foreign.current_experience == e.index
        if not stream.language:
            assert set(foreign.classes_in_this_experience) == set(e.classes)


def test_a_batch_of_mixed_experiences_is_each_sample_by_itself(stream: Stream) -> None:
    x = stream.experiences[0].train.raw()[:12]
    whose = torch.arange(12) % len(stream.experiences)
    mixed = stream.transform(x, whose, train=False)
    for i in range(12):
        assert torch.equal(mixed[i], stream.transform(x[i : i + 1], int(whose[i]), train=False)[0])


def test_each_epoch_visits_every_sample_once(stream: Stream) -> None:
    splits = [(stream.experiences[i].train, i) for i in stream.segments[0]]
    batches = BatchScheduler(splits, stream.transform, batch_size=512, epochs=1)
    seen = [(int(i), int(e)) for c in batches for i, e in zip(torch.cat(c.ids), torch.cat(c.task), strict=True)]
    assert sorted(seen) == sorted((int(i), e) for split, e in splits for i in split.index)


@pytest.mark.parametrize("name", ["split_digits", "arrays", "digit_attributes", "text_domains"])
def test_the_natural_order_does_not_depend_on_the_seed(name: str, opened: Opened) -> None:
    assert opened(name, 0).fingerprint == opened(name, 1).fingerprint


@pytest.mark.parametrize("name", ["split_digits", "arrays", "text_domains"])
def test_the_shuffled_order_does(name: str, opened: Opened) -> None:
    orders = {tuple(e.name for e in opened(name, s, class_order="shuffled").experiences) for s in range(4)}
    assert len(orders) > 1


@pytest.mark.parametrize("name", ["split_digits", "digit_attributes", "arrays", "image_folder", "text_domains"])
def test_opening_leaves_the_global_generators_alone(name: str, made_data) -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    wanted = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    open_stream({"name": name, **OPTIONS[name]}, CATALOGUE.find("task", name).load(), made_data, 0)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == wanted  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "scenario", "labels"),
    [
        ("split_digits", "task", [0, 1, 2, 3, 4]),
        ("split_digits", "domain", [0] * 5),
        ("split_digits", "joint", [0] * 5),
        ("split_digits", "online", [0] * 5),
        ("digit_attributes", "task", [0, 1, 2]),
        ("text_domains", "task", [0, 1, 2, 3]),
        ("text_domains", "online", [0] * 4),
    ],
)
def test_scenarios(name: str, scenario: str, labels: list[int], opened: Opened) -> None:
    stream = opened(name, scenario=scenario)
    assert [e.task_label for e in stream.experiences] == labels
    assert [len(s) for s in stream.segments] == ([len(labels)] if scenario == "joint" else [1] * len(labels))
    if scenario == "domain":
        assert stream.n_classes == 2
        assert stream.class_names == ("0/2/4/6/8", "1/3/5/7/9")
        for e in stream.experiences:
            assert e.classes == (0, 1)
    if scenario == "online":
        small = list(stream.benchmark.streams["train"])
        assert [len(s.dataset) for s in small] == [n for e in stream.experiences for n in e.parts or ()]
        if not stream.language:
            assert list(small[1].dataset.targets) == targets(stream.experiences[0].train)[10:20]


def test_more_permutations_begin_like_fewer(opened: Opened) -> None:
    short, long = opened("permuted_mnist", 3), opened("permuted_mnist", 3, experiences=4)
    x = short.experiences[0].train.x[:8]
    for e in range(3):
        assert torch.equal(short.transform(x, e, train=False), long.transform(x, e, train=False))
        assert not torch.equal(short.transform(x, e, train=False), short.transform(x, (e + 1) % 3, train=False))
    assert opened("permuted_mnist", 4).fingerprint != short.fingerprint


def test_published_split_mnist(opened: Opened) -> None:
    stream = opened("split_mnist", validation=0)
    assert [e.classes for e in stream.experiences] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [len(e.train) for e in stream.experiences] == [12665, 12089, 11263, 12183, 11800]
    assert [len(e.validation) for e in stream.experiences] == [0] * 5
    assert "validation" not in stream.benchmark.streams
    x = next(evaluation_batches(stream.experiences[0].test, 0, stream.transform, 64)).x
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)


def test_every_byte_of_a_domain_is_predicted_once(tmp_path: Path) -> None:
    text = bytes(range(65, 91)) * 77
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "picture.bin").write_bytes(b"\0\1")
    spec = {"domains": {"a": str(tmp_path)}, "length": 10, "bytes_per_domain": len(text)}
    stream = open_stream(spec, CATALOGUE.find("task", "text_domains").load(), data_folder(tmp_path), 0)
    counts: Counter[int] = Counter()
    e = stream.experiences[0]
    for split in (e.train, e.validation, e.test):
        for batch in evaluation_batches(split, 0, stream.transform, 7):
            counts.update(batch.y.flatten().tolist())
            assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
        assert int(split.raw()[0, 0]) == 257
    counts.pop(256, None)
    assert counts == Counter(text)
