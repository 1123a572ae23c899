"""Strategies compose: every two of them run, in either order, in any precision, and their state can be saved."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe import checkpoint
from cmoe.errors import RunFailed
from cmoe.session import Session

from .helpers import BY_TASK, LEARNED, WORLDS, run, same, weights

ALONE: dict[str, dict[str, Any]] = {
    "naive": {"name": "naive"},
    "replay": {"name": "replay", "size": 30, "batch": 4},
    "online_ewc": {"name": "online_ewc", "strength": 10.0},
    "lwf": {"name": "lwf"},
    "expand": {"name": "expand"},
    "cumulative": {"name": "cumulative"},
}
# all penalties at once have a test of their own
PENALTIES: dict[str, dict[str, Any]] = {
    "ewc": {"name": "ewc", "strength": 10.0, "samples": 4},
    "si": {"name": "si", "strength": 10.0},
    "mas": {"name": "mas", "strength": 10.0, "samples": 4},
    "rwalk": {"name": "rwalk", "strength": 10.0, "interval": 2},
}
SMALL = {"stream": {"limit": 2}, "trainer": {"max_steps": 3}, "model": {"moe": LEARNED}}


def whole(of: Session) -> None:
    """It ended well, its rows are there and its state is in a file that loads without unpickling."""
    assert of.folder.facts()["status"] == "FINISHED"
    assert [row for row in of.record.rows if row >= 0] == [s.last for s in of.segments]
    assert all(value.isfinite().all() for value in weights(of).values())
    state = checkpoint.load(of.folder.state)
    assert state is not None
    assert same(state["model"], weights(of))
    assert len(state["strategies"]) == len(of.strategies)


# naive acts nowhere, see below
@pytest.mark.parametrize(("first", "second"), list(permutations(list(ALONE)[1:], 2)))
def test_every_two_run(tmp_path: Path, first: str, second: str) -> None:
    whole(run(tmp_path, SMALL, {"strategy": [ALONE[first], ALONE[second]]}))


@pytest.mark.parametrize("other", list(ALONE)[1:])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_run_beside_each(tmp_path: Path, penalty: str, other: str) -> None:
    pair = [PENALTIES[penalty], ALONE[other]]
    whole(run(tmp_path, SMALL, {"strategy": pair if len(penalty + other) % 2 else pair[::-1]}))


@pytest.mark.parametrize("first", ALONE)
def test_naive_changes_nothing(tmp_path: Path, first: str) -> None:
    """Beside it a strategy gives the very weights that it gives alone."""
    alone = run(tmp_path, SMALL, {"strategy": ALONE[first]})
    if first != "naive":
        assert same(weights(alone), weights(run(tmp_path, SMALL, {"strategy": ["naive", ALONE[first]]})))


@pytest.mark.parametrize("world", WORLDS)
def test_all_together_in_every_modality(tmp_path: Path, world: str) -> None:
    strategies = [ALONE[n] for n in ("expand", "replay", "online_ewc", "lwf")]
    changes: dict[str, Any] = {
        "strategy": strategies,
        "stream": {"scenario": "task", "limit": 2},
        "trainer": {"max_steps": 2},
    }
    whole(run(tmp_path, WORLDS[world], changes, {"model": {"moe": BY_TASK}}))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["replay", "online_ewc", "lwf", "expand", "separate"])
def test_every_precision(tmp_path: Path, name: str, precision: str) -> None:
    head = "shared" if name == "replay" else "growing"
    moe = {"moe": LEARNED} if name == "expand" else {}
    changes = {"trainer": {"max_steps": 2, "precision": precision}, "model": {"head": head, **moe}}
    of = run(tmp_path, {"stream": {"limit": 2}, "strategy": ALONE.get(name, name)}, changes)
    whole(of)
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in of.model.parameters()} == {wanted}


def test_a_diverging_run_fails_and_says_so(tmp_path: Path) -> None:
    huge = {"optimizer": {"lr": 1e30}, "trainer": {"log_every": 0}}
    with pytest.raises(RunFailed, match=r"experience 0: the loss is .* a smaller optimizer\.lr may help"):
        run(tmp_path, {"strategy": "naive"}, huge)
