"""iCaRL against its formulas: herding by trying every sample, the loss output by output, the nearest mean."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import ICaRL
from cmoe.strategies.herding import herd

from .helpers import LEARNED, WORLDS, begin, metrics, opened, run
from .stepping import DOMAIN, EXACT, enter, goes_on_the_same, leave, take, the, walk
from .whole import decides_the_same

SPEC = {"strategy": {"name": "icarl", "size": 40}}


def after(root: Path, experiences: int, *changes: dict) -> Session:
    of = opened(root, EXACT, SPEC, *changes)
    for e in range(experiences):
        enter(of, e)
        walk(of, e, range(4))
        leave(of, e)
    return of


def features(of: Session, rows: list[int]) -> torch.Tensor:
    x = of.context.inputs(of.stream.experiences[0].train.x[rows], torch.zeros(len(rows), dtype=torch.int64), None)
    of.model.eval()
    with torch.no_grad():
        found = of.model(x, of.context.route(0)).features
    of.model.train()
    return found


@pytest.mark.parametrize("count", [1, 5, 30, 50])
def test_herding_takes_what_brings_the_mean_nearest(count: int) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order, mean = herd(x, count).tolist(), x.mean(0)
    assert len(order) == min(count, 30) == len(set(order))
    taken: list[int] = []
    for row in order:
        distance = {r: float((mean - x[[*taken, r]].mean(0)).norm()) for r in range(30) if r not in taken}
        assert distance[row] == pytest.approx(min(distance.values()))
        taken.append(row)
    assert herd(x, 30)[:7].tolist() == herd(x, 7).tolist()


@pytest.mark.parametrize("experiences", [1, 2, 3])
def test_each_class_has_an_equal_part_in_the_order_of_herding(tmp_path: Path, experiences: int) -> None:
    of = after(tmp_path, experiences)
    exemplars = the(of, ICaRL).exemplars
    assert sorted(exemplars) == sorted(c for e in of.stream.experiences[:experiences] for c in e.classes)
    for label, (e, rows) in exemplars.items():
        assert len(rows) == 40 // (2 * experiences)
        split = of.stream.experiences[e].train
        mine = [int(r) for r in split.index if int(split.y[r]) == label]
        assert set(rows) <= set(mine)
        if e == experiences - 1:  # older ones were chosen by another network's features
            found = features(of, mine)
            unit = found / found.norm(dim=1, keepdim=True).clamp(min=1e-12)
            assert rows == [mine[i] for i in herd(unit, len(rows)).tolist()]
    facts = the(of, ICaRL).facts()
    assert facts["icarl/samples"] == 2 * experiences * (40 // (2 * experiences))
    assert facts["icarl/bytes"] > facts["icarl/samples"] * 64


def test_exemplars_are_trained_on_beside_the_new_data(tmp_path: Path) -> None:
    of = after(tmp_path, 2)
    begin(of, of.segments[2])
    data = the(of, ICaRL).data(of.segments[2])
    assert [e.index for e in data] == [0, 1, 2]
    exemplars = the(of, ICaRL).exemplars.values()
    for e in (0, 1):
        assert sorted(data[e].train.index.tolist()) == sorted(r for f, rows in exemplars if f == e for r in rows)
    assert data[2] is of.stream.experiences[2]


@pytest.mark.parametrize("head", ["shared", "growing"])
def test_the_loss_output_by_output(tmp_path: Path, head: str) -> None:
    of = after(tmp_path, 1, {"model": {"head": head}, "stream": {"class_order": "shuffled"}})
    old = the(of, ICaRL).old
    assert old is not None
    enter(of, 1)
    batch = take(of, 1, 0)
    known, new = of.stream.experiences[0].classes, of.stream.experiences[1].classes
    units = of.model.head.unit_classes().tolist()
    output = of.model(batch.x, of.context.route(1))
    logits = output.logits.detach().tolist()
    with torch.no_grad():
        said = old(batch.x, of.context.route(1)).logits.sigmoid().tolist()
    terms = []
    for i, label in enumerate(batch.y.tolist()):
        for c in (*known, *new):
            p = 1 / (1 + math.exp(-logits[i][units.index(c)]))
            t = said[i][old.head.unit_classes().tolist().index(c)] if c in known else float(c == label)
            terms.append(-(t * math.log(p) + (1 - t) * math.log(1 - p)))
    assert float(the(of, ICaRL)._loss(output, batch)["icarl"].detach()) == pytest.approx(
        sum(terms) / len(terms), rel=1e-9
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_the_nearest_mean_of_exemplars_decides(tmp_path: Path, normalize: bool) -> None:
    of = after(
        tmp_path, 2, {"strategy": {"name": "icarl", "size": 40, "normalize": normalize}, "model": {"head": "growing"}}
    )
    exemplars, units = the(of, ICaRL).exemplars, of.model.head.unit_classes().tolist()
    x, y = [], []
    for label, (_, rows) in exemplars.items():
        found = features(of, rows)
        found = found / found.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else found
        mean = found.mean(0)
        x.append(mean / mean.norm().clamp(min=1e-12) if normalize else mean)
        y.append(label)
    known = NearestNeighbors(n_neighbors=1).fit(torch.stack(x).numpy())
    split = of.stream.experiences[1].test
    raw = split.x[split.index]
    inputs = of.context.inputs(raw, torch.ones(len(raw), dtype=torch.int64), None, train=False)
    of.model.eval()
    with torch.no_grad():
        logits = the(of, ICaRL).predict(inputs, None)
        mine = of.model(inputs, of.context.route(None)).features
    assert logits is not None
    mine = mine / mine.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else mine
    nearest = known.kneighbors(mine.numpy(), return_distance=False)
    assert [units[i] for i in logits.argmax(1).tolist()] == [y[i] for i in nearest.flatten()]
    assert logits.shape == (len(raw), len(units))


def test_state_goes_on_exactly(tmp_path: Path) -> None:
    goes_on_the_same(tmp_path, ICaRL, SPEC)


def test_a_whole_run_and_its_means_after_loading(tmp_path: Path) -> None:
    of = run(tmp_path / "a", SPEC, {"trainer": {"epochs": 3}, "model": {"moe": LEARNED, "head": "growing"}})
    assert metrics(of)["class_il/acc_macro"] > 0.4
    other = opened(tmp_path / "b", SPEC, {"model": {"moe": LEARNED, "head": "growing"}})
    decides_the_same(of, other, ICaRL, [None])


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.icarl: expected a stream with classes"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, SPEC)
    with pytest.raises(UserError, match=r"strategy\.icarl: expected each class in one experience only"):
        opened(tmp_path, DOMAIN, SPEC)
    with pytest.raises(UserError, match=r"strategy\.icarl: expected a head that all experiences share"):
        opened(tmp_path, {"stream": {"scenario": "task"}}, SPEC)
    with pytest.raises(UserError, match=r"strategy\.icarl\.size: expected at least 10"):
        opened(tmp_path, {"strategy": {"name": "icarl", "size": 9}})
