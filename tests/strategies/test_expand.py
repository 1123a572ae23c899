"""Experts that come and are frozen: what the old tasks are promised, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.moe.routers import TopK
from cmoe.session import Session

from .helpers import BY_TASK, LEARNED, WORLDS, logits_of, metrics, opened, run, same, weights

TASK: dict[str, Any] = {"stream": {"scenario": "task"}, "model": {"moe": BY_TASK}, "strategy": "expand"}
OPTIMIZERS = {
    "momentum and decay": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}},
    "adamw": {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5}},
    "kept state": {"optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.1, "reset": "never"}},
}
SHORT = {"trainer": {"max_steps": 6}}


class Watch:
    """Old tasks' logits and frozen weights at every row."""

    def __init__(self) -> None:
        self.logits: list[dict[int, Tensor]] = []
        self.frozen: list[dict[str, Tensor]] = []
        self.all: list[dict[str, Tensor]] = []
        self.ids: list[dict[str, list[int]]] = []

    def __call__(self, of: Session, row: int) -> None:
        units = [t for _, t in of.model.head.units]
        known = {e: [u for u, t in enumerate(units) if t <= e] for e in range(row + 1)}  # of tasks up to its own
        self.logits.append({e: logits_of(of, e)[..., known[e]] for e in range(row + 1)})
        tasks = of.model.head.block_tasks
        later = tuple(f"head.blocks.{b}." for b, task in enumerate(tasks) if task > row)  # these still wait to learn
        frozen = {n: p for n, p in of.model.named_parameters() if not p.requires_grad and not n.startswith(later)}
        self.frozen.append({n: p.detach().clone() for n, p in frozen.items()})
        self.all.append(weights(of))
        self.ids.append({n: list(layer.ids) for n, layer in of.model.moe_layers().items()})

    def drift(self) -> float:
        """How far old tasks' logits moved after their own row, at most; outputs only come behind."""
        moved = [0.0]
        for row, made in enumerate(self.logits):
            for e in range(row):
                before = self.logits[e][e]
                moved.append(float((made[e][..., : before.shape[-1]] - before).abs().max()))
        return max(moved)


def exactly(watch: Watch) -> None:
    for row, made in enumerate(watch.logits):
        for e in range(row):
            before = watch.logits[e][e]
            assert torch.equal(made[e][..., : before.shape[-1]], before), (row, e)
    for before, after in zip(watch.frozen, watch.all[1:], strict=False):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len(watch.frozen[-1]) > 0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_isolated_old_tasks_keep_every_bit(tmp_path: Path, world: str, optimizer: str) -> None:
    watch = Watch()
    of = run(tmp_path, WORLDS[world], TASK, SHORT, OPTIMIZERS[optimizer], on_row=watch)
    exactly(watch)
    rows = len(of.segments)
    assert rows >= 3
    assert watch.ids[-1] == {name: list(range(rows)) for name in of.model.moe_layers()}
    for before, after in zip(watch.all, watch.all[1:], strict=False):
        new = {k for k in after if k not in before}
        assert any("cohorts" in name for name in new)
    # the record says the same: columns of old tasks are equal in every later row
    for row, made in of.record.rows.items():
        for e in range(max(0, row)):
            for name, values in made.columns[e].arrays().items():
                assert np.array_equal(values, of.record.rows[e].columns[e].arrays()[name]), (row, e, name)


def test_isolated_with_a_growing_head(tmp_path: Path) -> None:
    """Task labels for the experts, one common head: earlier outputs stay as they are."""
    watch = Watch()
    of = run(tmp_path, TASK, {"model": {"head": "growing"}, "stream": {"class_order": "shuffled"}}, on_row=watch)
    exactly(watch)
    assert len(of.model.head.blocks) == 5


@pytest.mark.parametrize("beside", [{"name": "replay", "size": 40}, {"name": "online_ewc"}, {"name": "lwf"}])
def test_isolation_holds_beside_other_strategies(tmp_path: Path, beside: dict[str, Any]) -> None:
    watch = Watch()
    run(tmp_path, TASK, {"strategy": ["expand", beside], "stream": {"limit": 3}}, on_row=watch)
    exactly(watch)


def test_isolation_learns_new_tasks(tmp_path: Path) -> None:
    of = run(tmp_path, TASK, {"trainer": {"epochs": 6}, "model": {"hidden": [32]}})
    assert metrics(of)["task_il/acc_macro"] > 0.85
    assert metrics(of)["task_il/forgetting_chaudhry"] == 0.0


@pytest.mark.parametrize("changes", [{"strategy": {"name": "expand", "isolate": False}}, {"strategy": "naive"}])
def test_without_isolation_old_logits_move(tmp_path: Path, changes: dict[str, Any]) -> None:
    watch = Watch()
    run(tmp_path, TASK, changes, {"model": {"hidden": [16, 12], "moe": {"layers": "last"}}}, on_row=watch)
    assert watch.drift() > 1e-3


@pytest.mark.parametrize("world", ["mlp", "vit", "text_encoder"])
def test_a_learned_router_grows_and_old_cohorts_stay(tmp_path: Path, world: str) -> None:
    watch = Watch()
    spec = {"strategy": {"name": "expand", "experts": 2}, "model": {"moe": LEARNED}}
    of = run(tmp_path, WORLDS[world], spec, SHORT, OPTIMIZERS["adamw"], on_row=watch)
    rows = len(of.segments)
    for layer in of.model.moe_layers().values():
        assert isinstance(layer.router, TopK)
        assert len(layer.ids) == 2 * rows
        assert layer.frozen_ids == set(range(2 * rows - 2))
        assert sum(c.weight.shape[0] for c in layer.router.columns.values()) == 2 * rows
    for before, after in zip(watch.frozen, watch.all[1:], strict=False):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    frozen = set(watch.frozen[-1])
    assert any("router.columns" in n for n in frozen)
    assert any("cohorts" in n for n in frozen)
    assert all("router.columns" in n or "cohorts" in n for n in frozen), "the rest goes on learning"
    assert watch.drift() > 1e-3


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_what_is_added_does_not_depend_on_how_long_training_was(tmp_path: Path, init: str) -> None:
    """New weights come from a seed of their own: a longer first experience gives the same fresh experts."""
    from .helpers import begin

    added = []
    for draws in (1, 100):
        of = opened(tmp_path, TASK, {"strategy": {"name": "expand", "init": init}})
        begin(of, of.segments[0])
        torch.rand(draws)
        before = torch.get_rng_state()
        begin(of, of.segments[1])
        assert torch.equal(torch.get_rng_state(), before)
        added.append({n: v.clone() for n, v in of.model.state_dict().items() if "cohorts.1." in n})
    assert added[0]
    assert same(added[0], added[1])
    if init == "copy":
        assert all(
            torch.equal(v, of.model.state_dict()[n.replace("cohorts.1.", "cohorts.0.")]) for n, v in added[0].items()
        )


def test_an_expert_without_output_changes_nothing_at_first(tmp_path: Path) -> None:
    from .helpers import begin

    spec = {"strategy": {"name": "expand", "init": "zero"}, "model": {"moe": BY_TASK}}
    of = opened(tmp_path, WORLDS["text_encoder"], TASK, spec)
    begin(of, of.segments[0])
    begin(of, of.segments[1])
    for layer in of.model.moe_layers().values():
        y, _ = layer(torch.randn(3, 16), of.context.route(1))
        assert float(y.detach().abs().max()) == 0.0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"moe": None}}, "moe"),
    ({"model": {"head": "shared"}}, "head"),
    ({"strategy": {"name": "expand", "isolate": True}, "model": {"moe": LEARNED}}, "'topk'"),
    ({"strategy": {"name": "expand", "init": "zero"}}, "expand.init: zero is not possible"),
    ({"strategy": ["separate", "expand"]}, "no 'separate' beside 'expand'"),
    ({"strategy": ["expand", {"name": "cumulative", "restart": True}]}, "false beside 'expand'"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, TASK, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_topk_restricted_to_the_task_isolates(tmp_path: Path) -> None:
    watch = Watch()
    router = {"name": "topk", "k": 1, "order": "after", "restrict": "task"}
    run(tmp_path, TASK, {"model": {"moe": {"router": router, "experts": 2}}}, SHORT, on_row=watch)
    exactly(watch)
