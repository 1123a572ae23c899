"""The Fisher and the penalty against their formulas in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.learners import Batch
from cmoe.moe import RouteContext
from cmoe.session import Session
from cmoe.strategies import OnlineEWC
from cmoe.streams import evaluation_batches

from .helpers import BY_TASK, LEARNED, WORLDS, begin, merged, opened, run

MODELS: dict[str, dict[str, Any]] = {
    "all": {},
    "seen": {"model": {"train_outputs": "seen"}},
    "current": {"model": {"train_outputs": "current"}},
    "growing": {"model": {"head": "growing"}, "stream": {"class_order": "shuffled"}},
    "multi": {"stream": {"scenario": "task"}},
    "vit": WORLDS["vit"],
    "experts": {"model": {"moe": LEARNED}},
    "experts by task": {"stream": {"scenario": "task"}, "model": {"moe": merged(BY_TASK, {"experts": 2})}},
    "text": WORLDS["text_encoder"],
}


def ewc_of(of: Session) -> OnlineEWC:
    (found,) = (s for s in of.strategies if isinstance(s, OnlineEWC))
    return found


def at_second(root: Path, model: str, **options: Any) -> Session:
    """A run at the beginning of its second segment, with confident and with unsure outputs."""
    of = opened(root, {"strategy": {"name": "online_ewc", **options}}, MODELS[model])
    for segment in of.segments[:2]:
        begin(of, segment)
    with torch.no_grad():
        for parameter in of.model.parameters():
            parameter.mul_(1.5)
    return of


def formula(of: Session, fisher: str) -> dict[str, Tensor]:
    """mean over samples of w (d log p(y|x) / dθ)², w = 1 or p(y|x), in float64, one sample after the other."""
    model = copy.deepcopy(of.model).double().eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    experience = of.stream.experiences[1]
    units, kind = of.model.head.units, of.model.head.kind
    mode = of.plan.model["train_outputs"]
    classes = {"all": range(100), "seen": of.context.seen, "current": experience.classes}[mode]
    count = 0
    for x, y, _, _ in evaluation_batches(experience.train, 1, of.stream.transform, 1):
        x = x.double() if x.is_floating_point() else x
        logits = model(x, RouteContext(task=1)).logits[0]
        among = [u for u, (c, t) in enumerate(units) if (t == 1 if kind == "multi" else c in classes)]
        place = [units[u][0] for u in among].index(int(y))
        log_p = F.log_softmax(logits[among], 0)[place]
        gradients = torch.autograd.grad(log_p, list(named.values()), allow_unused=True)
        weight = float(log_p.detach().exp()) if fisher == "confidence" else 1.0
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] += weight * gradient.square()
        count += 1
    return {n: t / count for n, t in total.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-5 * scale + 1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fisher", ["empirical", "confidence"])
def test_fisher_is_its_formula(tmp_path: Path, model: str, fisher: str) -> None:
    of = at_second(tmp_path, model, fisher=fisher)
    found = ewc_of(of)._fisher(of.segments[1])
    expected = formula(of, fisher)
    close(found, expected)
    assert of.model.training
    assert sum(float(v.sum()) for v in expected.values()) > 1e-3
    other = formula(of, "empirical" if fisher == "confidence" else "confidence")
    with pytest.raises(AssertionError):
        close(found, other)


@pytest.mark.parametrize("model", ["all", "current", "multi", "vit"])
@pytest.mark.parametrize("fisher", ["empirical", "confidence"])
def test_vectorised_is_one_by_one(tmp_path: Path, model: str, fisher: str) -> None:
    of = at_second(tmp_path, model, fisher=fisher)
    ewc = ewc_of(of)
    of.model.eval()
    named = dict(of.model.named_parameters())
    at_once, single = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    for x, y, _, _ in evaluation_batches(of.stream.experiences[1].train, 1, of.stream.transform, 40):
        ewc._vectorised(at_once, named, x, y, 1)
        for i in range(len(y)):
            ewc._single(single, named, x[i : i + 1], y[i : i + 1], 1)
    close(at_once, {n: v.double() for n, v in single.items()})


def test_running_fisher_decays_and_the_anchor_moves(tmp_path: Path) -> None:
    of = at_second(tmp_path, "all", gamma=0.7)
    ewc = ewc_of(of)
    ewc.after_experience(of.segments[0])
    first = {n: v.clone() for n, v in ewc.importance.items()}
    with torch.no_grad():
        for p in of.model.parameters():
            p.add_(0.01)
    new = ewc._fisher(of.segments[1])
    ewc.after_experience(of.segments[1])
    for name, p in of.model.named_parameters():
        torch.testing.assert_close(ewc.importance[name], 0.7 * first[name] + new[name])
        assert torch.equal(ewc.anchor[name], p)
        assert ewc.anchor[name].data_ptr() != p.data_ptr()


def test_penalty_and_its_gradient(tmp_path: Path) -> None:
    of = at_second(tmp_path, "all", strength=2.5)
    ewc = ewc_of(of)
    batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), 1, torch.zeros(2, dtype=torch.int64), 2)
    output = of.model(batch.x, RouteContext())
    assert ewc.losses(output, batch) == {}, "nothing before the first experience ends"
    ewc.after_experience(of.segments[0])
    assert float(ewc.losses(output, batch)["ewc"].detach()) == 0.0
    with torch.no_grad():
        for p in of.model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    penalty = ewc.losses(output, batch)["ewc"]
    expected = sum(
        float((ewc.importance[n].double() * (p.detach().double() - ewc.anchor[n].double()) ** 2).sum())
        for n, p in of.model.named_parameters()
    )
    assert float(penalty.detach()) == pytest.approx(2.5 * expected, rel=1e-5)
    penalty.backward()
    for name, p in of.model.named_parameters():
        torch.testing.assert_close(p.grad, (5.0 * ewc.importance[name] * (p - ewc.anchor[name])).detach())


def test_new_outputs_are_free_and_frozen_weights_keep_their_importance(tmp_path: Path) -> None:
    of = at_second(tmp_path, "growing", gamma=0.5)
    ewc = ewc_of(of)
    ewc.after_experience(of.segments[1])
    assert "head.blocks.1.weight" in ewc.importance
    begin(of, of.segments[2])
    of.model.head.blocks[0].requires_grad_(False)
    kept = ewc.importance["head.blocks.0.weight"].clone()
    output = of.model(torch.rand(2, 1, 8, 8), RouteContext())
    batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), 2, torch.zeros(2, dtype=torch.int64), 2)
    assert "ewc" in ewc.losses(output, batch)
    ewc.after_experience(of.segments[2])
    assert torch.equal(ewc.importance["head.blocks.0.weight"], 0.5 * kept)
    assert "head.blocks.2.weight" in ewc.importance


def pulled(model: Iterable[Tensor], anchor: Iterable[Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(model, anchor, strict=True)) ** 0.5


def test_a_stronger_penalty_moves_less(tmp_path: Path) -> None:
    moved = []
    for strength in (0.0, 10.0, 1000.0):
        first: dict[str, Tensor] = {}

        def keep(of: Session, row: int, first: dict[str, Tensor] = first) -> None:
            if row == 0:
                first.update({n: p.detach().clone() for n, p in of.model.named_parameters()})

        spec = {"name": "online_ewc", "strength": strength}
        small = {"stream": {"limit": 2}, "optimizer": {"lr": 1e-3}, "trainer": {"epochs": 2}}
        of = run(tmp_path, {"strategy": spec}, small, on_row=keep)
        importance = ewc_of(of).importance
        assert importance.keys() == first.keys()
        moved.append(pulled([p.detach() for p in of.model.parameters()], first.values()))
    assert moved[0] > moved[1] > moved[2]


def test_state_survives_a_file(tmp_path: Path) -> None:
    of = at_second(tmp_path, "growing")
    ewc = ewc_of(of)
    ewc.after_experience(of.segments[1])
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    other = OnlineEWC()
    other.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    for mine, loaded in ((ewc.importance, other.importance), (ewc.anchor, other.anchor)):
        assert mine.keys() == loaded.keys()
        assert all(torch.equal(v, loaded[k]) for k, v in mine.items())
