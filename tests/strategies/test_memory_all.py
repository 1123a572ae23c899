"""What every strategy with a memory must do: go on exactly, run in every modality and precision, stand beside others."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cmoe import checkpoint
from cmoe.errors import UserError
from cmoe.strategies import AGEM, DER, ERACE, FDR, GEM, MIR, Strategy

from .helpers import BY_TASK, LEARNED, WORLDS, opened, run, same, weights
from .stepping import DOMAIN, EACH, HEADS, goes_on_the_same, two_experiences

MINE: dict[str, dict[str, Any]] = {
    "der": {"name": "der", "batch": 4, "size": 30, "beta": 0.5},
    "er_ace": {"name": "er_ace", "batch": 4, "size": 30},
    "a_gem": {"name": "a_gem", "batch": 4, "size": 30},
    "gem": {"name": "gem", "size": 30},
    "fdr": {"name": "fdr", "batch": 4, "size": 30},
    "mir": {"name": "mir", "batch": 4, "size": 30},
    "gdumb": {"name": "gdumb", "size": 30},
}
OTHERS: dict[str, dict[str, Any]] = {
    "replay": {"name": "replay", "size": 30, "batch": 4},
    "online_ewc": {"name": "online_ewc", "strength": 10.0},
    "lwf": {"name": "lwf", "warm_up": True},
    "expand": {"name": "expand"},
}
# its class, and options that make much of the memory in few steps; `gdumb` trains anew each time, see its own tests
STEPPING: dict[str, tuple[type[Strategy], dict[str, Any]]] = {
    "der": (DER, {"name": "der", "batch": 4, "size": 30, "beta": 0.5}),
    "er_ace": (ERACE, {"name": "er_ace", "batch": 6, "size": 40}),
    "a_gem": (AGEM, {"name": "a_gem", "batch": 6, "size": 50}),
    "gem": (GEM, {"name": "gem", "size": 50, "margin": 0.3}),
    "fdr": (FDR, {"name": "fdr", "batch": 5, "size": 40}),
    "mir": (MIR, {"name": "mir", "batch": 3, "candidates": 20, "size": 60}),
}
SMALL: dict[str, Any] = {"stream": {"limit": 2}, "trainer": {"max_steps": 3}, "model": {"moe": LEARNED}}


def whole(root: Path, strategies: list[dict[str, Any]], *changes: dict[str, Any]) -> None:
    """The run ends well and its state is in a file that loads without unpickling."""
    of = run(root, *changes, {"strategy": strategies})
    assert of.folder.facts()["status"] == "FINISHED"
    assert all(value.isfinite().all() for value in weights(of).values())
    state = checkpoint.load(of.folder.state)
    assert state is not None
    assert same(state["model"], weights(of))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", STEPPING)
def test_state_goes_on_exactly(tmp_path: Path, name: str, head: str) -> None:
    kind, spec = STEPPING[name]
    goes_on_the_same(tmp_path, kind, {"strategy": spec}, HEADS[head])


@pytest.mark.parametrize(("head", "precision"), EACH)
@pytest.mark.parametrize("name", ["a_gem", "gem", "fdr", "mir"])  # of the others more is expected, see their own tests
def test_two_experiences(tmp_path: Path, name: str, head: str, precision: str) -> None:
    two_experiences(tmp_path, {"strategy": STEPPING[name][1]}, HEADS[head], {"trainer": {"precision": precision}})


@pytest.mark.parametrize("world", ["text_encoder", "byte_lm"])
@pytest.mark.parametrize("name", ["a_gem", "gem", "mir"])
def test_texts(tmp_path: Path, name: str, world: str) -> None:
    few = {"batch": 2, "candidates": 4} if name == "mir" else {}
    spec = STEPPING[name][1] | few
    two_experiences(tmp_path, WORLDS[world], DOMAIN, {"strategy": spec, "trainer": {"max_steps": 3}})


@pytest.mark.parametrize("name", ["der", "er_ace", "fdr"])
def test_what_needs_classes_refuses_language(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}: expected a stream with classes, got language modelling"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"strategy": MINE[name]})


@pytest.mark.parametrize("name", ["a_gem", "gem", "fdr"])
def test_a_memory_without_a_sample_of_each_experience_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}\.size: expected at least 5, .*, got 4"):
        opened(tmp_path, {"strategy": {"name": name, "size": 4}})


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("mine", MINE)
def test_beside_others(tmp_path: Path, mine: str, other: str) -> None:
    if (mine, other) != ("gdumb", "expand"):  # refused, see its own tests
        pair = [MINE[mine], OTHERS[other]]
        whole(tmp_path, pair if len(mine) % 2 else pair[::-1], SMALL)


@pytest.mark.parametrize(("first", "second"), list(combinations(MINE, 2)))
def test_beside_each_other(tmp_path: Path, first: str, second: str) -> None:
    whole(tmp_path, [MINE[first], MINE[second]], SMALL, {"model": {"head": "growing"}})


@pytest.mark.parametrize("world", ["vit", "text_encoder"])
def test_together_in_every_modality_with_classes(tmp_path: Path, world: str) -> None:
    together = [OTHERS["expand"], *(MINE[n] for n in ("der", "er_ace", "a_gem", "gem", "fdr", "mir"))]
    small = {"stream": {"scenario": "task", "limit": 2}, "trainer": {"max_steps": 2}, "model": {"moe": BY_TASK}}
    whole(tmp_path, together, WORLDS[world], small)


@pytest.mark.parametrize("mine", ["der", "er_ace", "mir"])
def test_without_boundaries(tmp_path: Path, mine: str) -> None:
    online = {"stream": {"scenario": "online", "limit": 2}, "trainer": {"max_steps": 4}}
    whole(tmp_path, [MINE[mine]], online)
