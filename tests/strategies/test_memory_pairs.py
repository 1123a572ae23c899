"""Strategies with a memory beside others: they run, with experts that come and in every modality."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cmoe import checkpoint

from .helpers import BY_TASK, LEARNED, WORLDS, run, same, weights

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
SMALL: dict[str, Any] = {"stream": {"limit": 2}, "trainer": {"max_steps": 3}, "model": {"moe": LEARNED}}


def whole(root: Path, strategies: list[dict[str, Any]], *changes: dict[str, Any]) -> None:
    """The run ends well and its state is in a file that loads without unpickling."""
    of = run(root, *changes, {"strategy": strategies})
    assert of.folder.facts()["status"] == "FINISHED"
    assert all(value.isfinite().all() for value in weights(of).values())
    state = checkpoint.load(of.folder.state)
    assert state is not None
    assert same(state["model"], weights(of))


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
