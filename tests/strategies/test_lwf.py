"""Distillation against its formula, and what the warm-up may touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.learners import Batch
from cmoe.moe import RouteContext
from cmoe.session import Session
from cmoe.strategies import LwF, Phase, Segment

from .helpers import LEARNED, begin, opened, run, same, weights

HEADS: dict[str, dict[str, Any]] = {
    "shared": {},
    "growing": {"model": {"head": "growing"}, "stream": {"class_order": "shuffled"}},
    "multi": {"stream": {"scenario": "task"}},
    "domain": {"stream": {"scenario": "domain"}},
    "experts": {"model": {"moe": LEARNED, "head": "growing"}},
}
SHORT = {"stream": {"limit": 3}}


def lwf_of(of: Session) -> LwF:
    (found,) = (s for s in of.strategies if isinstance(s, LwF))
    return found


def after_two(root: Path, head: str, **options: Any) -> Session:
    """A run in its third segment: the teacher is what it was after the second, and the weights moved on."""
    of = opened(root, {"strategy": {"name": "lwf", **options}}, HEADS[head])
    generator = torch.Generator().manual_seed(0)
    for segment in of.segments[:3]:
        begin(of, segment)
        with torch.no_grad():
            for p in of.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        if segment.number < 2:
            lwf_of(of).after_experience(segment)
    return of


def batch(task: int, n: int = 6) -> Batch:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.zeros(n, dtype=torch.int64), task, torch.arange(n), n)


def soft(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities raised to 1/temperature and normalised again, as the reference describes it."""
    raised = torch.softmax(logits.double(), -1) ** (1 / temperature)
    return raised / raised.sum(-1, keepdim=True)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_its_formula(tmp_path: Path, head: str, temperature: float) -> None:
    of = after_two(tmp_path, head, alpha=0.7, temperature=temperature)
    lwf, drawn = lwf_of(of), batch(2)
    assert lwf.teacher is not None
    output = of.model(drawn.x, of.context.route(2))
    new, old = output.logits.detach(), lwf.teacher(drawn.x, of.context.route(2)).logits
    units = lwf.teacher.head.units
    if head == "multi":
        groups = [[u for u, (_, t) in enumerate(units) if t == task] for task in (0, 1)]
    else:
        groups = [[u for u, (c, _) in enumerate(units) if c in of.context.previous]]
    assert len(groups[0]) == {"multi": 2, "domain": 2}.get(head, 4)
    terms = []
    for group in groups:
        q_old, q_new = soft(old[:, group], temperature), soft(new[:, group], temperature)
        terms.append(float(-(q_old * q_new.log()).sum(1).mean()))
    losses = lwf.losses(output, drawn)
    assert list(losses) == ["distillation"]
    assert float(losses["distillation"].detach()) == pytest.approx(0.7 * sum(terms) / len(terms), rel=1e-5)


def test_l2_is_the_sum_of_all_squares(tmp_path: Path) -> None:
    of = after_two(tmp_path, "shared", alpha=0.0, l2=0.3)
    drawn = batch(2)
    losses = lwf_of(of).losses(of.model(drawn.x, RouteContext()), drawn)
    assert list(losses) == ["l2"]
    expected = sum(float(p.detach().double().square().sum()) for p in of.model.parameters())
    assert float(losses["l2"].detach()) == pytest.approx(0.3 * expected, rel=1e-5)


def test_nothing_is_distilled_in_the_first_experience(tmp_path: Path) -> None:
    of = opened(tmp_path, {"strategy": "lwf"})
    begin(of, of.segments[0])
    drawn = batch(0)
    assert lwf_of(of).losses(of.model(drawn.x, RouteContext()), drawn) == {}


@pytest.mark.parametrize("head", ["shared", "growing", "multi", "experts"])
def test_the_teacher_is_the_network_after_the_experience_before(tmp_path: Path, head: str) -> None:
    """Whatever other strategies or a growing head do at the beginning of the next one."""
    after: list[dict[str, Tensor]] = []
    teachers: list[dict[str, Tensor]] = []

    def row(of: Session, _: int) -> None:
        after.append(weights(of))
        teacher = lwf_of(of).teacher
        assert teacher is not None
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        teachers.append({n: v.clone() for n, v in teacher.state_dict().items()})

    spec = ["expand", "lwf"] if head == "experts" else ["lwf"]
    of = run(tmp_path, {"strategy": spec}, HEADS[head], SHORT, on_row=row)
    assert len(after) == 3
    assert all(same(a, t) for a, t in zip(after, teachers, strict=True))
    assert not same(after[0], after[1])
    assert of.model.training


def test_the_teacher_does_not_move_while_the_network_learns(tmp_path: Path) -> None:
    of = after_two(tmp_path, "shared")
    lwf = lwf_of(of)
    assert lwf.teacher is not None
    of.learner.begin_phase(of.optimizer_options.build(of._trainable()), None)
    before, started = {n: v.clone() for n, v in lwf.teacher.state_dict().items()}, weights(of)
    for _ in range(3):
        drawn = batch(2)
        drawn.y += of.context.seen[-1]
        of.learner.step(drawn)
    assert same(before, lwf.teacher.state_dict())
    assert not same(started, weights(of))


class Stages:
    """Weights at the beginning and the end of each phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, str, str, dict[str, Tensor], dict[str, Tensor] | None]] = []
        inner, after = LwF.before_phase, LwF.after_phase

        def before_phase(strategy: LwF, segment: Segment, phase: Phase) -> None:
            inner(strategy, segment, phase)
            self.note(strategy, segment, phase, "begin")

        def after_phase(strategy: LwF, segment: Segment, phase: Phase) -> None:
            after(strategy, segment, phase)
            self.note(strategy, segment, phase, "end")

        monkeypatch.setattr(LwF, "before_phase", before_phase)
        monkeypatch.setattr(LwF, "after_phase", after_phase)

    def note(self, strategy: LwF, segment: Segment, phase: Phase, when: str) -> None:
        state = {n: v.detach().clone() for n, v in strategy.context.model.state_dict().items()}
        teacher = None if strategy.teacher is None else {n: v.clone() for n, v in strategy.teacher.state_dict().items()}
        self.seen.append((segment.number, phase.name, when, state, teacher))


@pytest.mark.parametrize("head", ["shared", "growing", "multi"])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_warm_up_trains_new_outputs_alone(
    tmp_path: Path, head: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch)
    spec = {"strategy": {"name": "lwf", "warm_up": True}, "trainer": {"clip_norm": clip}}
    of = run(tmp_path, spec, HEADS[head], SHORT)
    named = [(number, phase, when) for number, phase, when, _, _ in stages.seen]
    expected = [(0, "train", "begin"), (0, "train", "end")]
    for number in range(1, 3):
        expected += [(number, phase, when) for phase in ("warm_up", "train") for when in ("begin", "end")]
    assert named == expected
    by_name = {(n, p, w): (state, teacher) for n, p, w, state, teacher in stages.seen}
    for number in range(1, 3):
        before, after = by_name[number, "warm_up", "begin"][0], by_name[number, "warm_up", "end"][0]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        new = set(of.stream.experiences[number].classes)
        if head == "shared":
            assert moved == {"head.blocks.0.weight", "head.blocks.0.bias"}
            rows = (before["head.blocks.0.weight"] != after["head.blocks.0.weight"]).any(1).nonzero().flatten()
            assert set(rows.tolist()) == new
        else:
            assert moved == {f"head.blocks.{number}.weight", f"head.blocks.{number}.bias"}
        teacher = by_name[number, "train", "begin"][1]
        assert teacher is not None
        assert same(teacher, after), "the answers are those of the network after the warm-up"
        whole = by_name[number, "train", "end"][0]
        assert any(not torch.equal(after[n], whole[n]) for n in after if n.startswith("backbone"))


@pytest.mark.parametrize(
    "without",
    [
        {"stream": {"scenario": "domain"}},
        {"stream": {"name": "tiny_bytes", "scenario": "domain"}, "model": {"name": "byte_lm"}},
    ],
)
def test_no_warm_up_where_there_is_no_new_output(
    tmp_path: Path, without: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch)
    small = {"trainer": {"max_steps": 2}, "optimizer": {"lr": 0.01}}
    run(tmp_path, {"strategy": {"name": "lwf", "warm_up": True}}, without, small)
    assert {phase for _, phase, _, _, _ in stages.seen} == {"train"}
    assert all(teacher is not None for number, _, _, _, teacher in stages.seen if number)


def test_warm_up_beside_old_samples(tmp_path: Path) -> None:
    """With 'cumulative' whole batches may be old: they teach the new outputs nothing, and are no error."""
    small = {"trainer": {"batch_size": 2, "max_steps": 40}}
    of = run(tmp_path, {"strategy": [{"name": "lwf", "warm_up": True}, "cumulative"]}, small)
    assert all(v.isfinite().all() for v in weights(of).values())


@pytest.mark.parametrize("head", HEADS)
def test_state_survives_a_file(tmp_path: Path, head: str) -> None:
    of = after_two(tmp_path, head)
    lwf = lwf_of(of)
    torch.save(lwf.state_dict(), tmp_path / "lwf.pt")
    other = LwF()
    other.context = of.context
    before = torch.get_rng_state()
    other.load_state_dict(torch.load(tmp_path / "lwf.pt", weights_only=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert lwf.teacher is not None
    assert other.teacher is not None
    assert same(lwf.teacher.state_dict(), other.teacher.state_dict())
    x = batch(2).x
    assert torch.equal(lwf.teacher(x, RouteContext()).logits, other.teacher(x, RouteContext()).logits)
