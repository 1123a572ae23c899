"""Context-dependent gating against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.moe import RouteContext
from cmoe.session import Session
from cmoe.strategies import XdG

from .helpers import LEARNED, WORLDS, opened, run, weights
from .stepping import EXACT, enter, leave, take, the, walk
from .whole import ends_the_same, predicts_the_same

TASK = {"stream": {"scenario": "task", "limit": 3}, "model": {"hidden": [20, 10]}}
SHORT = {"trainer": {"max_steps": 5}}
XDG = {"strategy": {"name": "xdg", "share": 0.7}}


def gated(of: Session, x: Tensor, task: int) -> Tensor:
    """Logits by the formula."""
    h = x.flatten(1)
    for layer, gates in zip(of.model.backbone.get_submodule("layers").children(), the(of, XdG).of(task), strict=True):
        h = (h @ layer.get_parameter("weight").T + layer.get_parameter("bias")).relu() * gates
    return of.model.head(h)


@pytest.mark.parametrize("share", [0.0, 0.7, 0.99])
def test_so_many_units_are_silent(tmp_path: Path, share: float) -> None:
    of = opened(tmp_path, TASK, {"strategy": {"name": "xdg", "share": share}})
    drawn = [the(of, XdG).of(task) for task in range(5)]
    for gates in drawn:
        assert [int((~g).sum()) for g in gates] == [min(round(share * n), n - 1) for n in (20, 10)]
    if share == 0.7:
        assert len({tuple(g[0].tolist()) for g in drawn}) == 5


def test_gates_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    one, other = (
        opened(tmp_path / "a", TASK, XDG),
        opened(tmp_path / "b", TASK, XDG, {"evaluation": {"initial": False}}),
    )
    torch.rand(7)
    assert not the(other, XdG).gates
    for task in (4, 0, 2):
        for a, b in zip(the(one, XdG).of(task), the(other, XdG).of(task), strict=True):
            assert torch.equal(a, b)


def test_logits_are_their_formula(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, TASK, XDG)
    batch = take(of, 0, 0)
    for task in range(5):
        expected = gated(of, batch.x, task)
        for training in (True, False):
            found = of.model(batch.x, of.context.route(task, training)).logits
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        by_label = the(of, XdG).predict(batch.x, task)
        assert by_label is not None
        assert torch.equal(by_label, found)
    mixed = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    found = of.model(batch.x, RouteContext(task=mixed)).logits
    for row, task in enumerate(mixed.tolist()):
        torch.testing.assert_close(found[row], gated(of, batch.x, task)[row], rtol=1e-12, atol=1e-12)
    assert the(of, XdG).predict(batch.x, None) is None


def test_weights_into_silent_units_do_not_move(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, TASK, XDG)
    before = weights(of)
    enter(of, 0)
    walk(of, 0, range(4))
    leave(of, 0)
    first, second = the(of, XdG).of(0)
    moved = {n: w != before[n] for n, w in weights(of).items()}
    assert not moved["backbone.layers.0.weight"][~first].any()
    assert not moved["backbone.layers.1.weight"][~second].any()
    assert not moved["backbone.layers.1.weight"][:, ~first].any()
    assert moved["backbone.layers.1.weight"].any()


@pytest.mark.parametrize("other", ["online_ewc", "si", "mas", "replay", "ncm", "a_gem"])
def test_beside_others(tmp_path: Path, other: str) -> None:
    of = run(tmp_path, TASK, SHORT, {"strategy": [other, XDG["strategy"]]})
    assert of.folder.facts()["status"] == "FINISHED"
    assert sum(f.get("xdg/bytes", 0) for f in (s.facts() for s in of.strategies)) >= 3 * 30


def test_one_output_layer_for_all_tasks_may_be_shared(tmp_path: Path) -> None:
    assert run(tmp_path, TASK, SHORT, XDG, {"model": {"head": "shared"}}).folder.facts()["status"] == "FINISHED"


def test_a_stopped_run_ends_the_same(tmp_path: Path) -> None:
    strategies = {"strategy": [XDG["strategy"], "online_ewc"], "trainer": {"chunk": 3, "max_steps": 7}}
    state = ends_the_same(tmp_path, 4, TASK, strategies)
    assert {0, 1, 2} <= set(state["strategies"][0]["gates"])


def test_predictions_and_exports_have_the_gates(tmp_path: Path) -> None:
    predicts_the_same(run(tmp_path, TASK, SHORT, XDG), tmp_path / "export", labelled=True)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision(tmp_path: Path, precision: str) -> None:
    of = run(tmp_path, TASK, SHORT, XDG, {"trainer": {"precision": precision}, "stream": {"limit": 2}})
    assert of.folder.facts()["status"] == "FINISHED"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": {"scenario": "class"}}, "a strategy that needs no task label in scenario 'class'"),
    ({"model": WORLDS["vit"]["model"]}, "strategy.xdg: expected model.name 'mlp', on whose hidden units it puts gates, got 'vit'"),
    ({"model": {"moe": LEARNED}}, "strategy.xdg: expected a model without experts"),
    ({"model": {"hidden": []}}, "strategy.xdg: expected model.hidden with at least one layer"),
    ({"strategy": ["xdg", "lwf"]}, "strategy.xdg: expected no 'lwf' beside it, the other network"),
    ({"strategy": ["xdg", "hat"]}, "one strategy with its own way to predict"),
    ({"strategy": {"name": "xdg", "share": 1.0}}, "share"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, TASK, XDG, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
