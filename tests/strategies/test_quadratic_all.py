"""What every quadratic penalty must do: go on exactly, follow experts and heads, stand beside others, refuse nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.api import plan_of
from cmoe.errors import UserError
from cmoe.strategies import EWC, MAS, SI, OnlineEWC, RWalk
from cmoe.strategies.quadratic import Quadratic

from .helpers import BY_TASK, DIGITS, LEARNED, WORLDS, begin, merged, opened, run, same, weights
from .stepping import DOMAIN, EACH, EXACT, HEADS, enter, goes_on_the_same, leave, second, the, two_experiences, walk
from .whole import ends_the_same, equal

MINE: dict[str, tuple[type[Quadratic], dict[str, Any]]] = {
    "ewc": (EWC, {"name": "ewc", "strength": 10.0, "samples": 4}),
    "si": (SI, {"name": "si", "strength": 10.0}),
    "mas": (MAS, {"name": "mas", "strength": 10.0, "samples": 4}),
    "rwalk": (RWalk, {"name": "rwalk", "strength": 10.0, "interval": 4}),
}
ALL: dict[str, tuple[type[Quadratic], dict[str, Any]]] = {
    **MINE,
    "online_ewc": (OnlineEWC, {"name": "online_ewc", "strength": 10.0}),
}
SMALL: dict[str, Any] = {"stream": {"limit": 2}, "trainer": {"max_steps": 3}, "model": {"moe": LEARNED}}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MINE)
def test_state_goes_on_exactly(tmp_path: Path, name: str, head: str) -> None:
    kind, spec = MINE[name]
    goes_on_the_same(tmp_path, kind, {"strategy": spec}, HEADS[head])


@pytest.mark.parametrize("name", MINE)
def test_what_follows_the_steps_is_in_the_state(tmp_path: Path, name: str) -> None:
    """Saved after five steps of the second experience, the importances at its end are those of a run without a break."""
    kind, spec = MINE[name]
    changes = {"strategy": spec}
    of = second(tmp_path, changes)
    torch.save(the(of, kind).state_dict(), tmp_path / "strategy.pt")
    torch.save(weights(of), tmp_path / "model.pt")
    other = opened(tmp_path, EXACT, changes)
    for segment in other.segments[:2]:
        other.begin(segment)
    other.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    the(other, kind).load_state_dict(torch.load(tmp_path / "strategy.pt", weights_only=True))
    ((_, phase),) = other.remaining_phases(other.segments[1])
    the(other, kind).before_phase(other.segments[1], phase)
    other.model.train()
    other.learner.begin_phase(other.optimizer_options.build(other._trainable()), None)
    for each in (of, other):
        walk(each, 1, range(5, 8))
        leave(each, 1)
    assert same(weights(of), weights(other))
    equal(the(of, kind).state_dict(), the(other, kind).state_dict())


@pytest.mark.parametrize("name", MINE)
def test_a_stopped_run_ends_the_same(tmp_path: Path, name: str) -> None:
    """Stopped in the middle of the second experience, with momentum and experts that are added and frozen."""
    changes = {
        "stream": {"scenario": "task", "limit": 3},
        "model": {"moe": BY_TASK},
        "strategy": [MINE[name][1], {"name": "expand"}],
        "optimizer": {"momentum": 0.9},
        "trainer": {"max_steps": 6, "chunk": 2},
    }
    ends_the_same(tmp_path, 4, changes)


@pytest.mark.parametrize("name", MINE)
def test_added_experts_are_free_and_frozen_ones_stay_known(tmp_path: Path, name: str) -> None:
    """New experts have no importance until their experience is over; those that are frozen then keep theirs."""
    kind, spec = MINE[name]
    moe = {"stream": {"scenario": "task"}, "model": {"moe": BY_TASK}}
    of = opened(tmp_path, EXACT, moe, {"strategy": [{"name": "expand"}, spec]})

    def known() -> set[str]:
        return {n for importance, _ in the(of, kind).terms() for n in importance}

    enter(of, 0)
    walk(of, 0, range(3))
    leave(of, 0)
    first = known()
    enter(of, 1)
    names = dict(of.model.named_parameters())
    experts = {n for n in names if "cohorts" in n}
    new = experts - first
    assert new
    assert first & experts
    assert any(not names[n].requires_grad for n in first & experts), "expand freezes old experts"
    penalised = {id(p) for p, _, _ in the(of, kind).held()}
    assert penalised
    assert penalised == {id(p) for n, p in names.items() if n in first and p.requires_grad}
    walk(of, 1, range(3))
    leave(of, 1)
    assert first <= known()
    assert new & known()


@pytest.mark.parametrize("name", MINE)
def test_changed_shapes_and_gone_weights_are_dropped(tmp_path: Path, name: str) -> None:
    kind, spec = MINE[name]
    of = second(tmp_path, {"strategy": spec})
    strategy = the(of, kind)
    (importance, anchor), *_ = strategy.terms()
    odd, *_ = importance
    importance[odd], anchor[odd] = torch.ones(2, 3, 5).double(), torch.ones(2, 3, 5).double()
    importance["gone"], anchor["gone"] = torch.ones(2).double(), torch.ones(2).double()
    strategy._pairs = None
    walk(of, 1, range(5, 6))
    leave(of, 1)
    begin(of, of.segments[2])
    shapes = {n: p.shape for n, p in of.model.named_parameters()}
    assert all(f.shape == shapes[n] for terms in strategy.terms() for held in terms for n, f in held.items())


@pytest.mark.parametrize(("head", "precision"), EACH)
@pytest.mark.parametrize("name", MINE)
def test_two_experiences(tmp_path: Path, name: str, head: str, precision: str) -> None:
    of = two_experiences(tmp_path, {"strategy": MINE[name][1]}, HEADS[head], {"trainer": {"precision": precision}})
    assert the(of, MINE[name][0]).facts()[f"{name}/bytes"] > 0


@pytest.mark.parametrize("world", ["vit", "text_encoder", "byte_lm"])
@pytest.mark.parametrize("name", MINE)
def test_every_modality(tmp_path: Path, name: str, world: str) -> None:
    spec = MINE[name][1] | ({"fisher": "empirical"} if name == "ewc" else {})
    changes = {"strategy": ["expand", spec], "trainer": {"max_steps": 2}, "model": {"moe": BY_TASK}}
    two_experiences(tmp_path, WORLDS[world], {"stream": {"scenario": "task"}}, changes)


def test_all_at_once_have_losses_and_figures_of_their_own(tmp_path: Path) -> None:
    of = run(tmp_path, SMALL, {"strategy": [spec for _, spec in ALL.values()]})
    facts = [key for s in of.strategies for key in s.facts()]
    assert sorted(facts) == sorted(f"{name}/bytes" for name in ALL)
    assert len({kind.term for kind, _ in ALL.values()}) == len(ALL)


@pytest.mark.parametrize("name", MINE)
def test_without_strength_it_changes_nothing(tmp_path: Path, name: str) -> None:
    spec = MINE[name][1] | {"strength": 0.0}
    assert same(weights(run(tmp_path, SMALL, {"strategy": spec})), weights(run(tmp_path, SMALL)))


@pytest.mark.parametrize("name", MINE)
def test_a_stronger_penalty_stays_nearer(tmp_path: Path, name: str) -> None:
    kind, spec = MINE[name]
    moved = []
    for strength in (0.0, 0.3, 3.0):
        of = opened(tmp_path, EXACT, DOMAIN, {"strategy": spec | {"strength": strength}, "optimizer": {"lr": 0.02}})
        enter(of, 0)
        walk(of, 0, range(10))
        leave(of, 0)
        enter(of, 1)
        walk(of, 1, range(10))
        away = [(f * (p - a) ** 2).sum().detach() for p, f, a in the(of, kind).held()]
        moved.append(float(torch.stack(away).sum()))
    assert moved[0] > moved[1] > moved[2] > 0


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "strength", -1) for name in MINE),
        ("ewc", "fisher", "confidence"),
        ("ewc", "samples", -1),
        ("mas", "samples", 1.5),
        ("si", "damping", 0),
        ("si", "gradient", "all"),
        ("rwalk", "alpha", 1.1),
        ("rwalk", "interval", 0),
        ("rwalk", "damping", 0),
        ("rwalk", "normalise", "maybe"),
    ],
)
def test_bad_options_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{option}.*expected"):
        plan_of(merged(DIGITS, {"strategy": {"name": name, option: value}}))


@pytest.mark.parametrize("name", MINE)
def test_boundaries_are_needed(name: str) -> None:
    with pytest.raises(UserError, match="online"):
        plan_of(merged(DIGITS, {"strategy": name, "stream": {"scenario": "online"}}))
