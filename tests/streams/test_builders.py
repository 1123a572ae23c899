"""Builders and opening: class orders, scenarios, fingerprints, foreign benchmarks."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from cmoe.errors import UserError
from cmoe.streams import Stream, Task, attributes, class_incremental, data_folder, domain_incremental, task_incremental
from cmoe.streams.arrays import hold_out, storage
from cmoe.streams.stream import Layout, Split
from cmoe.streams.task import Modality
from cmoe.streams.view import layout_of

from .conftest import Cells, cells


def labels(split: Split) -> list[int]:
    y = split.targets()
    assert y is not None
    return y.tolist()


def layout(benchmark: Any) -> Layout:
    found = layout_of(benchmark)
    assert found is not None
    return found


def test_the_layout_is_shared_and_not_copied(stream: Stream) -> None:
    first = stream.experiences[0]
    assert all(e.train.x.data_ptr() == first.train.x.data_ptr() for e in stream.experiences)
    assert layout(stream.benchmark).experiences is stream.experiences
    x = np.zeros((12, 3, 4), dtype=np.uint8)
    assert storage(x, "image", "x").data_ptr() == x.ctypes.data


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]])
def test_explicit_class_order(order: list[int]) -> None:
    stream = cells(class_order=order)
    assert [c for e in stream.experiences for c in e.classes] == order
    assert stream.experiences[0].name == f"{order[0]}+{order[1]}"


def test_shuffled_class_order_is_the_seeds() -> None:
    def order(seed: int) -> list[int]:
        return [c for e in cells(seed, class_order="shuffled").experiences for c in e.classes]

    assert order(3) == order(3)
    assert len({tuple(order(s)) for s in range(5)}) > 1
    assert sorted(order(0)) == list(range(6))


def test_validation_is_the_same_whatever_seed_and_order() -> None:
    def held(**options: Any) -> list[int]:
        stream = cells(**options)
        return sorted(int(i) for e in stream.experiences for i in e.validation.index)

    assert held() == held(seed=7) == held(class_order="shuffled", seed=2) == held(experiences=6)
    assert len(held()) == 12
    assert held(validation=0.0) == []
    assert len(held(validation=0.5)) == 60


def test_domain_scenario_relabels_by_position() -> None:
    stream = cells(scenario="domain", class_order=[4, 1, 0, 2, 5, 3])
    raw = cells(class_order=[4, 1, 0, 2, 5, 3])
    assert stream.n_classes == 2
    assert stream.class_names == ("4/0/5", "1/2/3")
    for ours, theirs in zip(stream.experiences, raw.experiences, strict=True):
        position = {c: p for p, c in enumerate(theirs.classes)}
        assert labels(ours.train) == [position[c] for c in labels(theirs.train)]


def test_task_and_joint() -> None:
    assert [e.task_label for e in cells(scenario="task").experiences] == [0, 1, 2]
    assert cells(scenario="joint").segments == [(0, 1, 2)]
    assert cells().segments == [(0,), (1,), (2,)]


def test_online_parts() -> None:
    stream, again, other = (
        cells(scenario="online", online_size=7),
        cells(scenario="online", online_size=7),
        cells(1, scenario="online"),
    )
    e = stream.experiences[0]
    assert e.parts == (7, 7, 7, 7, 7, 1)
    assert torch.equal(e.train.index, again.experiences[0].train.index)
    assert not torch.equal(e.train.index, other.experiences[0].train.index)
    small = list(stream.benchmark.streams["train"])
    assert len(small) == 18
    assert [e.is_first_subexp for e in small[:7]] == [True, *[False] * 5, True]


def test_fingerprints() -> None:
    base = cells().fingerprint
    assert cells(seed=9).fingerprint == base
    variants: list[dict[str, Any]] = [
        {"shift": 1},
        {"validation": 0.2},
        {"class_order": [1, 0, 2, 3, 4, 5]},
        {"scenario": "task"},
        {"scenario": "joint"},
        {"scenario": "online"},
        {"experiences": 2},
    ]
    assert len({base, *(cells(**v).fingerprint for v in variants)}) == len(variants) + 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.9])
def test_hold_out(share: float) -> None:
    y = torch.tensor([0] * 50 + [1] * 7 + [2] * 2 + [3])
    keep, held = hold_out(y, share)
    assert torch.equal(torch.cat((keep, held)).sort().values, torch.arange(60))
    for label, n in enumerate((50, 7, 2, 1)):
        expected = 0 if not share or n == 1 else min(max(1, round(share * n)), n - 1)
        assert int((y[held] == label).sum()) == expected


@dataclass
class Shared(Task):
    """Domains."""

    scenario: Literal["class", "domain", "task", "joint", "online"] = "domain"
    many: bool = False

    def benchmark(self, data: Any, seed: int) -> Any:
        pair = torch.rand(40, 5), torch.arange(40) % 2
        if self.many:
            return domain_incremental(self, seed, train=[pair] * 3, test=[pair] * 3, modality="vector", names="abc")
        return domain_incremental(self, seed, train=pair, test=pair, experiences=3, modality="vector")


def test_domains() -> None:
    shared, apart = cells(task=Shared), cells(task=Shared, many=True)
    assert len(shared.experiences[0].train.x) == 40
    assert shared.experiences[0].train is shared.experiences[2].train
    assert len(apart.experiences[0].train.x) == 120
    assert [e.name for e in apart.experiences] == ["a", "b", "c"]
    assert [e.name for e in cells(task=Shared, many=True, class_order=[2, 0, 1]).experiences] == ["c", "a", "b"]
    with pytest.raises(UserError, match="share their samples"):
        cells(task=Shared, class_order="shuffled")
    with pytest.raises(UserError, match="'class' needs classes of each experience's own"):
        cells(task=Shared, scenario="class")


def test_task_incremental_always_gives_labels() -> None:
    task = Cells(scenario="class")
    pair = torch.rand(12, 2), torch.arange(12) % 4
    benchmark = task_incremental(task, 0, train=pair, test=pair, experiences=2, modality="vector")
    assert [e.task_label for e in layout(benchmark).experiences] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train": (torch.rand(4, 2), [0, 1, 0]), "experiences": 1}, "expected 4 labels"),
        ({"train": (torch.rand(4, 2), [0, 1, 0, -1]), "experiences": 1}, "got -1"),
        ({"train": (torch.rand(4, 2), [0.0, 1, 0, 1]), "experiences": 1}, "one integer label a sample"),
        ({"train": (torch.rand(4, 2), [0, 2, 0, 2]), "experiences": 1}, "class 1 of 3 has none"),
        ({"class_names": ["a"], "experiences": 1}, "expected 0..0, got 1"),
        ({"train": (torch.rand(4, 3), [0, 1, 0, 1]), "experiences": 1}, "expected shape (3,)"),
        ({"groups": [[0]]}, "each of the 2 classes 0..1 in one group"),
        ({"train": (torch.rand(0, 2), np.zeros(0, int)), "experiences": 1}, "expected at least one, got none"),
        ({"experiences": 4}, "expected a divisor of the 2 classes (1, 2), got 4"),
    ],
)
def test_arguments(arguments: dict[str, Any], said: str) -> None:
    pair = torch.rand(4, 2), [0, 1, 0, 1]
    given: dict[str, Any] = {"train": pair, "test": pair, "modality": "vector", **arguments}
    with pytest.raises(UserError) as caught:
        class_incremental(Cells(), 0, **given)
    assert said in str(caught.value)


def test_attributes_need_their_labels() -> None:
    x = torch.rand(6, 2)
    with pytest.raises(UserError, match="no labels for 'colour'"):
        attributes(
            Cells(scenario="joint"),
            0,
            train=(x, {"color": [0] * 6}),
            test=(x, {}),
            class_names={"colour": ["red"]},
            modality="vector",
        )


@dataclass
class Foreign(Task):
    """A benchmark that Avalanche's own functions made."""

    modality: ClassVar[Modality] = "vector"

    kind: str = "classes"

    def benchmark(self, data: Any, seed: int) -> Any:
        from avalanche.benchmarks import (
            benchmark_from_datasets,
            benchmark_with_validation_stream,
            class_incremental_benchmark,
            task_incremental_benchmark,
        )
        from avalanche.benchmarks.utils import TransformGroups, as_classification_dataset
        from torch.utils.data import TensorDataset

        def dataset(seed: int, n: int) -> Any:
            random = torch.Generator().manual_seed(seed)
            found: Any = TensorDataset(torch.rand(n, 5, generator=random), torch.arange(n) % 4)
            found.targets = (torch.arange(n) % 4).tolist()
            groups = TransformGroups({"train": lambda x: x + 1, "eval": lambda x: x})
            return as_classification_dataset(found, transform_groups=groups)

        if self.kind == "nonsense":
            return [1, 2]
        if self.kind == "raises":
            raise KeyError("a\nb")
        if self.kind == "no test":
            return benchmark_from_datasets(train=[dataset(0, 40)])
        if self.kind == "one test":
            return benchmark_from_datasets(train=[dataset(0, 40), dataset(1, 44)], test=[dataset(2, 20).eval()])
        made = class_incremental_benchmark(
            {"train": dataset(0, 40), "test": dataset(1, 20).eval()}, num_experiences=2, seed=seed
        )
        if self.kind == "tasks":
            made = task_incremental_benchmark(made)
        if self.kind == "validation":
            made = benchmark_with_validation_stream(made, 0.25)
        return made


def _label(split: Split, row: int) -> int:
    assert split.y is not None
    return int(split.y[row])


def foreign(seed: int = 0, **options: Any) -> Stream:
    return cells(seed, Foreign, **options)


@pytest.mark.parametrize("kind", ["classes", "tasks", "one test"])
def test_foreign_benchmarks_are_read_out(kind: str) -> None:
    stream = foreign(kind=kind)
    for e, theirs in zip(stream.experiences, stream.benchmark.streams["train"], strict=True):
        rows = torch.cat((e.train.index, e.validation.index)).sort().values
        assert len(rows) == len(theirs.dataset)
        assert len(e.validation) == (4 if kind == "one test" else 2)
        for row, (x, y, *_) in zip(rows.tolist(), theirs.dataset, strict=True):
            assert torch.equal(e.train.x[row], x)
            assert _label(e.train, row) == y
        assert e.task_label == (e.index if kind == "tasks" else 0)
    assert stream.experiences[0].train.x.min() >= 1, "the training transform was applied"
    assert stream.experiences[0].test.x.max() <= 1, "and the evaluation transform"
    assert stream.fingerprint == foreign(kind=kind).fingerprint


def test_foreign_generators_are_kept_from_ours() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    foreign()
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nonsense", "must return an Avalanche benchmark, got list"),
        ("raises", "benchmark() failed: KeyError: 'a\\nb'"),
        ("no test", "needs the streams 'train' and 'test', it has train"),
    ],
)
def test_foreign_faults(kind: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        foreign(kind=kind)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_native_avalanche_strategies_train_on_our_benchmark() -> None:
    from avalanche.logging import TextLogger
    from avalanche.models import SimpleMLP
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    for scenario in ("class", "online"):
        stream = cells(scenario=scenario)
        model = SimpleMLP(num_classes=6, input_size=12, hidden_size=16)
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=10,
            plugins=[ReplayPlugin(mem_size=8)],
            evaluator=EvaluationPlugin(loggers=[TextLogger(io.StringIO())]),
        )
        before = [p.clone() for p in model.parameters()]
        for experience in list(stream.benchmark.streams["train"])[:2]:
            strategy.train(experience)
        strategy.eval(stream.benchmark.streams["test"])
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_data_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_folder("a", {"CMOE_DATA": "b"}).root.name == "a"
    assert data_folder(None, {"CMOE_DATA": "b"}).root.name == "b"
    assert data_folder(None, {}).root.parts[-2:] == (".cache", "cmoe")
