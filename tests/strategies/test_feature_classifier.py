"""What strategies whose head is made of statistics have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.errors import UserError
from cmoe.strategies import NCM, SLDA

from .helpers import LEARNED, WORLDS, opened, run, same, weights
from .stepping import DOMAIN, EACH, EXACT, HEADS, enter, leave, the, two_experiences, walk
from .whole import ends_the_same, predicts_the_same

KINDS: dict[str, type[NCM | SLDA]] = {"ncm": NCM, "slda": SLDA}
THREE = {"stream": {"limit": 3}, "trainer": {"max_steps": 8}}
SMALL = {"stream": {"limit": 2}, "trainer": {"max_steps": 3}}


@pytest.mark.parametrize("train", ["first", "never"])
@pytest.mark.parametrize("name", KINDS)
def test_the_network_learns_in_the_first_experience_or_never(tmp_path: Path, name: str, train: str) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    of = run(
        tmp_path,
        THREE,
        {"strategy": {"name": name, "train": train}},
        on_row=lambda of, row: seen.append({n: w for n, w in weights(of).items() if n.startswith("backbone")}),
    )
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])
    fresh = opened(tmp_path / "fresh", THREE)
    begun = {n: w for n, w in weights(fresh).items() if n.startswith("backbone")}
    assert same(seen[0], begun) == (train == "never")
    assert of.learner.steps == (8 if train == "first" else 0)


@pytest.mark.parametrize("name", KINDS)
def test_old_classes_are_still_known(tmp_path: Path, name: str) -> None:
    """Without any training, on features of random weights."""
    wide = {"model": {"hidden": [64]}, "strategy": {"name": name, "train": "never"}}
    of = run(tmp_path, wide)
    column = of.record.rows[4].columns[0]
    assert column.pred is not None
    targets = of.stream.experiences[0].test.targets()
    assert targets is not None
    assert (column.pred == targets.numpy()).mean() > 0.6


@pytest.mark.parametrize(("name", "head"), [("ncm", "growing"), ("slda", "multi"), ("slda", "experts")])
def test_state_goes_on_exactly(tmp_path: Path, name: str, head: str) -> None:
    changes: tuple[Any, ...] = (EXACT, {"strategy": name}, HEADS[head])
    of, other = opened(tmp_path / "a", *changes), opened(tmp_path / "b", *changes)
    enter(of, 0)
    walk(of, 0, range(5))
    leave(of, 0)
    torch.save(the(of, KINDS[name]).state_dict(), tmp_path / "strategy.pt")
    other.begin(other.segments[0])
    other.model.restore_structure(of.model.structure())
    other.model.load_state_dict(weights(of))
    the(other, KINDS[name]).load_state_dict(torch.load(tmp_path / "strategy.pt", weights_only=True))
    for each in (of, other):
        each.begin(each.segments[1])
        each.strategies[0].before_experience(each.segments[1])
        assert list(each.remaining_phases(each.segments[1])) == []
        leave(each, 1)
    assert same(weights(of), weights(other))
    with_both = the(other, KINDS[name]).count
    assert int(with_both.sum()) == sum(len(of.stream.experiences[e].train) for e in (0, 1))


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_run_ends_the_same(tmp_path: Path, name: str) -> None:
    ends_the_same(tmp_path, 2, {"strategy": name, "stream": {"limit": 3}, "trainer": {"chunk": 3}})


@pytest.mark.parametrize(("name", "head"), [("ncm", "multi"), ("slda", "growing")])
def test_predictions_and_exports_see_it(tmp_path: Path, name: str, head: str) -> None:
    of = run(tmp_path, THREE, {"strategy": name, "model": {"eval_outputs": "seen"}}, HEADS[head])
    predicts_the_same(of, tmp_path / "export", labelled=False)


@pytest.mark.parametrize(("head", "precision"), EACH)
def test_two_experiences(tmp_path: Path, head: str, precision: str) -> None:
    two_experiences(tmp_path, {"strategy": "slda"}, HEADS[head], {"trainer": {"precision": precision}})


@pytest.mark.parametrize("world", ["vit", "text_encoder"])
def test_every_modality_with_classes(tmp_path: Path, world: str) -> None:
    two_experiences(tmp_path, WORLDS[world], {"strategy": "slda", "trainer": {"max_steps": 2}})


@pytest.mark.parametrize(("name", "scenario"), [("ncm", "domain"), ("slda", "joint")])
def test_other_scenarios(tmp_path: Path, name: str, scenario: str) -> None:
    of = run(tmp_path, THREE, {"strategy": name, "stream": {"scenario": scenario}})
    assert int(the(of, KINDS[name]).count.sum()) == sum(len(e.train) for e in of.stream.experiences[:3])


def test_without_boundaries_nothing_is_trained(tmp_path: Path) -> None:
    online = {"stream": {"scenario": "online", "limit": 2}}
    of = run(tmp_path, online, {"strategy": {"name": "slda", "train": "never"}})
    assert of.learner.steps == 0
    with pytest.raises(UserError, match=r"strategy\.slda\.train: expected 'never' in scenario 'online', got 'first'"):
        opened(tmp_path, online, {"strategy": "slda"})


@pytest.mark.parametrize("other", ["replay", "online_ewc", "a_gem", "si", "rwalk"])
@pytest.mark.parametrize("name", KINDS)
def test_beside_others(tmp_path: Path, name: str, other: str) -> None:
    """They act in the experience that trains."""
    pair = [name, other] if name == "ncm" else [other, name]
    of = run(tmp_path, SMALL, {"strategy": pair, "model": {"moe": LEARNED}})
    assert of.folder.facts()["status"] == "FINISHED"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": ["ncm", "slda"]}, "strategy.ncm: expected no 'slda' beside it, it makes the outputs itself, got it"),
    ({"strategy": ["slda", "gdumb"]}, "strategy.slda: expected no 'gdumb' beside it, it would draw"),
    ({"strategy": ["expand", "ncm"], "model": {"moe": LEARNED}}, "strategy.ncm: expected no 'expand' beside it"),
    ({"strategy": [{"name": "lwf", "warm_up": True}, "ncm"]}, "strategy.ncm: expected no 'lwf' beside it"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", KINDS)
def test_language_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}: expected a stream with classes, got language modelling"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"strategy": name})
