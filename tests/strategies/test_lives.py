"""Strategies that prune, merge, upcycle and collapse, and those that find other experts than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe import checkpoint
from cmoe.backbones.byte_lm import PADDING
from cmoe.errors import UserError
from cmoe.moe import MoELayer
from cmoe.moe.surgery import Dense
from cmoe.session import Session

from .helpers import LEARNED, WORLDS, begin, opened, run, same, weights

BYTES = {"stream": {"scenario": "domain"}}  # bytes have no classes
EVERY = {name: [WORLDS[name], BYTES] if name == "byte_lm" else [WORLDS[name]] for name in WORLDS}
FOUR = {"moe": {"experts": 4, "router": {"name": "topk", "k": 2}}}
SHORT = {"stream": {"limit": 3}, "trainer": {"max_steps": 4}}
KEPT = {"optimizer": {"name": "adam", "lr": 0.003, "reset": "never"}}


def sizes(of: Session) -> list[int]:
    return [len(layer.ids) for layer in of.model.moe_layers().values()]


def events(of: Session, *kinds: str) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    found = [e for e in of.timeline.events if not kinds or e["kind"] in kinds]
    return [(e["kind"], e["layer"], tuple(e["experts"]), e["experience"], e["after"]) for e in found]


def logits(of: Session) -> Tensor:
    """Of the first experience's test samples, in the run's own precision."""
    of.model.eval()
    test = of.stream.experiences[0].test
    with torch.no_grad():
        x = of.context.inputs(test.raw()[:40], torch.zeros(min(40, len(test)), dtype=torch.int64), None, train=False)
        x = x[:, :-1] if of.stream.language else x
        found = of.model(x, of.context.route(0)).logits
    of.model.train()
    # behind the end of a text a dense network computes something, a layer of experts nothing; nobody reads it
    return found[x != PADDING] if of.stream.language else found


def test_pruning_keeps_the_most_used(tmp_path: Path) -> None:
    used: dict[str, dict[int, int]] = {}

    def watch(of: Session, row: int) -> None:
        used.update({f"{row} {n}": dict(layer.usage) for n, layer in of.model.moe_layers().items()})

    of = run(tmp_path, {"strategy": {"name": "prune", "keep": 2}, "model": FOUR}, SHORT, KEPT, on_row=watch)
    assert sizes(of) == [2]
    assert [(kind, row, after) for kind, _, _, row, after in events(of)] == [("removed", 0, 1)]
    (gone,) = [ids for _, _, ids, _, _ in events(of)]
    assert len(gone) == 2
    assert set(used["0 layers.0"]) <= set(range(4)) - set(gone)


def test_pruning_by_share_of_the_last_experience(tmp_path: Path) -> None:
    spec = {"name": "prune", "below": 1.0, "count": "experience"}
    of = run(tmp_path, {"strategy": spec, "model": FOUR}, SHORT)
    assert sizes(of) == [1]
    of = run(tmp_path, {"strategy": {**spec, "below": 0.0}, "model": FOUR}, SHORT)
    assert sizes(of) == [4]
    layer = next(iter(of.model.moe_layers().values()))
    assert sum(layer.usage.values()) == 4 * 16 * 2  # steps, batch, k: of one experience alone


def test_experts_of_tasks_are_not_pruned_unless_told(tmp_path: Path) -> None:
    kept = {"strategy": ["expand", {"name": "prune", "keep": 1}], "model": {"moe": LEARNED}}
    assert sizes(run(tmp_path, kept, SHORT)) == [2 + 1 + 1]
    gone = {"strategy": ["expand", {"name": "prune", "keep": 1, "assigned": True}], "model": {"moe": LEARNED}}
    assert sizes(run(tmp_path, gone, SHORT)) == [1]


@pytest.mark.parametrize("pairs", ["unused", "used", "alike"])
def test_merging_holds_the_budget(tmp_path: Path, pairs: str) -> None:
    counts: list[list[int]] = []
    spec = ["expand", {"name": "merge_experts", "experts": 3, "pairs": pairs}]
    of = run(
        tmp_path,
        {"strategy": spec, "model": {"moe": LEARNED}},
        SHORT,
        KEPT,
        on_row=lambda of, row: counts.append(sizes(of)),
    )
    assert counts == [[2], [3], [3]]
    (merged,) = events(of, "merged")
    assert merged[3:] == (2, 1)
    layer = next(iter(of.model.moe_layers().values()))
    assert {e for ids in layer.tasks.values() for e in ids} <= set(layer.ids)
    assert set(layer.tasks) == {0, 1, 2}


def test_parks_rule_replaces_the_least_used_by_the_mean_of_the_two_most_used(tmp_path: Path) -> None:
    before: dict[str, Any] = {}
    of = opened(tmp_path, {"strategy": "merge_experts", "model": FOUR}, SHORT)
    (layer,) = of.model.moe_layers().values()
    layer.usage.update({0: 5, 1: 30, 2: 10, 3: 10})
    before = {n: p.detach().clone() for n, p in layer.cohorts["0"].named_parameters()}
    of.strategies[0].after_experience(of.segments[0])
    assert layer.ids == (1, 2, 3, 4)
    for name, p in layer.cohorts[layer.view.where[4][0]].named_parameters():
        torch.testing.assert_close(p[0], (3 * before[name][1] + before[name][2]) / 4)
    assert [e[0] for e in events(of)] == ["added", "removed"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", [False, True])
def test_an_upcycled_model_computes_the_same_at_that_moment(tmp_path: Path, world: str, split: bool) -> None:
    if split and world == "mlp":
        pytest.skip("its hidden layers have no hidden units of their own")
    spec = {"name": "upcycle", "experts": 2, "split": split}
    of = opened(tmp_path, *EVERY[world], {"strategy": spec, "trainer": {"precision": "64-true"}})
    begin(of, of.segments[0])
    assert not of.model.moe_layers()
    of.begin(of.segments[1])
    before = logits(of)
    random = torch.get_rng_state()
    of.strategies[0].before_experience(of.segments[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert sizes(of)
    assert all(size == 2 for size in sizes(of))
    assert (logits(of) - before).abs().max() <= 1e-12
    assert {kind for kind, *_ in events(of)} == {"upcycled"}
    assert {(row, after) for *_, row, after in events(of)} == {(1, 0)}


@pytest.mark.parametrize("world", WORLDS)
def test_upcycling_then_adding_in_every_modality(tmp_path: Path, world: str) -> None:
    spec = [{"name": "upcycle", "experts": 2}, {"name": "expand", "init": "nearest", "noise": 0.1, "samples": 20}]
    of = run(tmp_path, *EVERY[world], {"strategy": spec}, {"trainer": {"max_steps": 2}}, KEPT)
    rows = len(of.segments)
    assert all(size == 2 + rows - 1 for size in sizes(of))
    for layer in of.model.moe_layers().values():
        assert layer.tasks[0] == (0, 1)
        assert layer.frozen_ids == set(layer.ids) - {max(layer.ids)}
    assert {kind for kind, *_ in events(of)} == {"upcycled", "assigned", "frozen", "added"}


def test_looking_at_the_data_changes_no_other_weight(tmp_path: Path) -> None:
    """Init 'nearest' runs the model on the new experience: generators, counters and modes are as without."""
    states = []
    for init in ("copy", "nearest"):
        of = opened(tmp_path, {"strategy": {"name": "expand", "init": init}, "model": {**FOUR, "dropout": 0.3}})
        begin(of, of.segments[0])
        begin(of, of.segments[1])
        (layer,) = of.model.moe_layers().values()
        states.append((torch.get_rng_state(), dict(layer.usage), [m.training for m in of.model.modules()]))
        columns = layer.router.columns["1"].weight
        states[-1] += (columns.detach().clone(),)
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:3] == states[1][1:3]
    assert torch.equal(states[0][3], states[1][3])


@pytest.mark.parametrize("how", ["merge", "single", "distil"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_that_ends_dense(tmp_path: Path, world: str, how: str) -> None:
    spec = {"name": "collapse", "how": how, "steps": 3, "samples": 20}
    of = run(tmp_path, *EVERY[world], {"strategy": spec, "model": {"moe": LEARNED}}, {"trainer": {"max_steps": 2}})
    assert not of.model.moe_layers()
    assert any(isinstance(m, Dense) for m in of.model.modules())
    assert not any(isinstance(m, MoELayer) for m in of.model.modules())
    assert {(kind, row, after) for kind, _, _, row, after in events(of)} == {("collapsed", of.segments[-1].last, 1)}
    state = checkpoint.load(of.folder.state)
    assert state is not None
    assert same(state["model"], weights(of))


def test_collapsed_on_the_way_it_trains_on_as_a_dense_model(tmp_path: Path) -> None:
    of = run(tmp_path, {"strategy": {"name": "collapse", "after": 1}, "model": FOUR}, SHORT, KEPT)
    assert not of.model.moe_layers()
    assert {row for *_, row, _ in events(of)} == {0}


def test_what_is_kept_of_the_optimizer_is_that_of_the_surviving_experts(tmp_path: Path) -> None:
    """`optimizer.reset: never`: splitting a cohort by freezing does not lose the state of either part."""
    of = opened(tmp_path, {"strategy": "expand", "model": FOUR}, SHORT, KEPT)
    segment = of.segments[0]
    begin(of, segment)
    for number, phase in of.remaining_phases(segment):
        of.fit(segment, number, phase)
    (layer,) = of.model.moe_layers().values()
    name = "backbone.layers.0.cohorts.0.w"
    before = {k: v.clone() for k, v in of.carried[name].items()}
    from cmoe.moe import surgery

    of.context.record(surgery.freeze(of.model, [1, 2]), 0)
    keys = {layer.view.where[e][0] for e in layer.ids}
    assert len(keys) == 2
    for key in keys:
        held = of.carried[f"backbone.layers.0.cohorts.{key}.w"]
        rows = list(layer.cohort_ids[key])
        assert torch.equal(held["exp_avg"], before["exp_avg"][rows])
        assert torch.equal(held["exp_avg_sq"], before["exp_avg_sq"][rows])
    of.context.record(surgery.merge(of.model, [0, 1]), 0)
    key, _ = layer.view.where[4]
    assert of.carried[f"backbone.layers.0.cohorts.{key}.w"]["exp_avg"].shape[0] == 1
    assert set(of.carried) <= set(dict(of.model.named_parameters()))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": {"name": "prune"}, "model": FOUR}, "prune: expected one of keep and below, got none"),
    ({"strategy": {"name": "prune", "keep": 1, "below": 0.1}, "model": FOUR}, "got both"),
    ({"strategy": {"name": "prune", "keep": 1}}, "model.moe"),
    ({"strategy": "merge_experts"}, "model.moe"),
    ({"strategy": "collapse"}, "model.moe"),
    ({"strategy": "upcycle", "model": FOUR}, "expected a dense model"),
    ({"strategy": {"name": "upcycle", "layers": [3]}}, "layers: expected indices from 0 to 0, got [3]"),
    ({"strategy": {"name": "upcycle", "split": True}}, "with split, got 4"),
    ({"strategy": ["upcycle", {"name": "cumulative", "restart": True}]}, "experts it would draw anew"),
    ({"strategy": ["separate", {"name": "prune", "keep": 1}], "model": FOUR, "stream": {"scenario": "task"}}, "anew"),
    ({"strategy": {"name": "expand", "noise": 0.1}, "model": FOUR}, "expand.noise"),
    (
        {"strategy": {"name": "expand", "init": "nearest"}, "stream": {"scenario": "task"},
         "model": {"moe": {"experts": 1, "router": "task_table"}}},
        "looks at the data",
    ),
    ({"strategy": {"name": "upcycle", "router": "task_table"}}, "needs no task label"),
    ({"strategy": {"name": "prune", "keep": 1}, "model": {"moe": {"router": "soft"}}}, "assign tokens to experts"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_decoder_is_not_upcycled_with_a_router_that_looks_ahead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="causal"):
        opened(tmp_path, *EVERY["byte_lm"], {"strategy": {"name": "upcycle", "router": "expert_choice"}})
