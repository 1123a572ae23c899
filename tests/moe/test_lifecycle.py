"""Experts that come, freeze, split and go: isolation, ids, state dicts, optimizer state."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

from cmoe.moe import MoELayer, ParameterChange, RouteContext, carry_state, migrate_optimizer

DIM, HIDDEN, TOKENS = 16, 32, 29
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}


def make(router="topk", **options):
    layer = MoELayer(DIM, HIDDEN, experts=4, router=router, **options)
    with torch.no_grad():
        for p in layer.router.parameters():
            p.normal_(0, 0.5)
    return layer


def step(layer, optimizer, context=None, seed=0):
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    y, routing = layer(x, context)
    (y.square().sum() + sum(routing.aux.values())).backward()
    optimizer.step()


def rows(layer):
    """{(expert id, parameter name): its row}, for experts and router columns."""
    found = {}
    for kind, modules in zip(("expert", "router"), layer.stacked_modules(), strict=True):
        for key, module in modules.items():
            for name, p in module.named_parameters():
                for row, expert in enumerate(layer.cohort_ids[key]):
                    found[expert, kind, name] = p.detach()[row].clone()
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["label", "labels", "visible", "restrict"])
@pytest.mark.parametrize("dispatch", ["auto", "loop", "bmm"])
def test_isolation_is_bit_identical(optimizer, dtype, mode, dispatch):
    """Old tasks' outputs after adding a cohort and training it, with momentum and decay, on everything not frozen."""
    router = {"label": "task_table", "labels": "task_table", "visible": "topk"}.get(
        mode, {"name": "topk", "restrict": "task"}
    )
    layer = make(router, dispatch=dispatch).to(dtype)
    layer.assign([0], 0)
    layer.assign([1, 3], 1)
    contexts = {
        "label": [RouteContext(task=0), RouteContext(task=1)],
        "labels": [RouteContext(task=torch.arange(TOKENS) % 2)],
        "visible": [RouteContext(visible=(0, 1, 2, 3)), RouteContext(visible=(1, 3))],
        "restrict": [RouteContext(task=0), RouteContext(task=1)],
    }[mode]
    optim = OPTIMIZERS[optimizer](layer.parameters())
    x = torch.randn(TOKENS, DIM).to(dtype)

    def train(context, seed):
        optim.zero_grad(set_to_none=False)  # a gradient of zero must not move what is frozen either
        y, routing = layer(torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype), context)
        (y.float().square().sum() + sum(routing.aux.values())).backward()
        optim.step()

    for seed in range(3):
        train(contexts[seed % len(contexts)], seed)
    layer.eval()
    before = [layer(x, context) for context in contexts]
    layer.train()

    layer.freeze(layer.ids)
    new = layer.add_experts(2, tasks=[2])
    assert new == [4, 5]
    migrate_optimizer(optim, ParameterChange(), layer.parameters())
    fresh = rows(layer)
    context = RouteContext(task=2) if mode != "visible" else RouteContext()
    for seed in range(5):
        train(context, 10 + seed)
    layer.eval()
    for context, (y, routing) in zip(contexts, before, strict=True):
        y_after, after = layer(x, context)
        assert torch.equal(y, y_after)
        assert torch.equal(routing.ids, after.ids)
        assert torch.equal(routing.weights, after.weights)
    after = rows(layer)
    assert any(not torch.equal(fresh[key], after[key]) for key in after if key[0] in new)
    assert all(torch.equal(fresh[key], after[key]) for key in after if key[0] not in new)


def test_restricted_tokens_of_several_tasks_see_their_own_experts_only():
    """Replay mixes tasks in a batch: each token is routed as in a batch of its task alone."""
    layer = make({"name": "topk", "restrict": "task", "k": 2, "z": 0.1, "importance": 0.1}).double()
    layer.assign([0], 0)
    layer.assign([1, 3], 1)  # and task 2 has none of its own: it sees all
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    task, valid = torch.arange(TOKENS) % 3, torch.arange(TOKENS) % 5 != 0
    mixed, routing = layer(x, RouteContext(task=task, valid=valid))
    aux: dict[str, float] = {}
    for label in range(3):
        mine = task == label
        alone, expected = layer(x[mine], RouteContext(task=label, valid=valid[mine]))
        torch.testing.assert_close(mixed[mine], alone, rtol=1e-12, atol=1e-12)
        k = expected.ids.shape[1]
        assert torch.equal(routing.ids[mine][:, :k], expected.ids)
        assert (routing.ids[mine][:, k:] == -1).all()
        for name, loss in expected.aux.items():
            aux[name] = aux.get(name, 0.0) + loss.item() * mine.sum().item() / TOKENS
    assert routing.aux.keys() == aux.keys() == {"switch", "importance", "z"}
    for name, loss in aux.items():
        assert routing.aux[name].item() == pytest.approx(loss, rel=1e-12)
    (mixed.square().sum() + sum(routing.aux.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_part_of_a_cohort_stays_and_the_rest_trains_as_if_nothing_was_split(optimizer):
    layer = make()
    optim = OPTIMIZERS[optimizer](layer.parameters())
    for seed in range(3):
        step(layer, optim, seed=seed)
    change = layer.freeze([1, 2])
    migrate_optimizer(optim, change)
    assert layer.frozen_ids == {1, 2}
    start = rows(layer)
    for seed in range(3, 6):
        step(layer, optim, seed=seed)
    end = rows(layer)
    for key in start:
        assert torch.equal(start[key], end[key]) == (key[0] in (1, 2)), key


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", ["migrate", "carry"])
def test_optimizer_state_follows_splits(optimizer, how):
    """Splitting and thawing at once changes nothing in the trajectory: state is sliced along exactly.

    (Adafactor clips updates by their norm over the whole parameter, so there only the state itself is compared.)
    """
    whole = make(dispatch="loop")
    split = copy.deepcopy(whole)
    optims = [OPTIMIZERS[optimizer](layer.parameters()) for layer in (whole, split)]
    for seed in range(4):
        for layer, optim in zip((whole, split), optims, strict=True):
            step(layer, optim, seed=seed)
    change = split.freeze([1]) + split.freeze([0]) + split.thaw([0, 1])
    if how == "migrate":
        migrate_optimizer(optims[1], change)
    else:
        anew = OPTIMIZERS[optimizer](split.parameters())
        carry_state(optims[1], anew, change)
        optims[1] = anew
    assert len(split.cohort_ids) == 3
    held = [p for group in optims[1].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in split.parameters()}
    assert len(held) == len(set(held))
    assert set(optims[1].state) <= set(held)
    for key, ids in split.cohort_ids.items():
        for name, p in split.cohorts[key].named_parameters():
            old = optims[0].state[dict(whole.cohorts["0"].named_parameters())[name]]
            for field, value in optims[1].state[p].items():
                per_row = value.dim() and old[field].shape[0] == 4  # not steps, nor Adafactor's column statistics
                expected = old[field][list(ids)] if per_row else old[field]
                assert torch.equal(value, expected), (key, name, field)
    if optimizer == "adafactor":
        return
    for seed in range(4, 8):
        for layer, optim in zip((whole, split), optims, strict=True):
            step(layer, optim, seed=seed)
    left, right = rows(whole), rows(split)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-6)


def test_optimizer_state_is_dropped_with_removed_experts_and_kept_for_the_others():
    layer = make()
    layer.add_experts(2)
    optim = OPTIMIZERS["adam"](layer.parameters())
    step(layer, optim, RouteContext())
    kept = optim.state[layer.cohorts["0"].w1]["exp_avg"][[0, 2, 3]].clone()
    migrate_optimizer(optim, layer.remove([1, 4, 5]))
    assert torch.equal(optim.state[layer.cohorts["0"].w1]["exp_avg"], kept)
    assert {p for group in optim.param_groups for p in group["params"]} == set(optim.state)
    assert set(optim.state) == set(layer.parameters())
    new = layer.add_experts(1)
    migrate_optimizer(optim, ParameterChange(), added=layer.parameters())
    before = rows(layer)
    for seed in range(5):
        step(layer, optim, seed=seed)
    assert not torch.equal(rows(layer)[new[0], "router", "weight"], before[new[0], "router", "weight"])


def test_changes_add_up():
    layer = make()
    old = dict(layer.cohorts["0"].named_parameters())
    first = layer.remove([0])  # 1, 2, 3
    second = layer.freeze([2])  # 1, 3 | 2
    third = layer.remove([3])
    total = first + second + third
    assert layer.ids == (1, 2)
    by_name = {id(p): (key, name) for key in layer.cohorts for name, p in layer.cohorts[key].named_parameters()}
    found = {by_name[id(new)]: parts for new, parts in total.sources.items() if id(new) in by_name}
    assert {(key, name): rows for (key, name), [(p, rows)] in found.items() if p is old[name]} == {
        (key, name): ((1,) if key == "0" else (2,)) for key in ("0", "1") for name in old
    }
    assert {id(p) for p in old.values()} <= {id(p) for p in total.removed}
    assert len(total.sources) == len(list(layer.parameters()))  # no parameter from in between


def test_ids_are_for_life():
    layer = make("task_table")
    x = torch.randn(TOKENS, DIM)
    layer.assign([3], 7)
    y, _ = layer(x, RouteContext(task=7))
    first = rows(layer)
    assert layer.add_experts(2) == [4, 5]
    layer.remove([0, 5])
    assert layer.ids == (1, 2, 3, 4)
    assert layer.add_experts(1) == [6]
    layer.remove([1, 2])
    assert layer.ids == (3, 4, 6)
    now = rows(layer)
    assert all(torch.equal(now[key], value) for key, value in first.items() if key[0] == 3)
    assert layer.tasks == {7: (3,)}
    torch.testing.assert_close(layer(x, RouteContext(task=7))[0], y, rtol=1e-6, atol=1e-6)
    layer.remove([3])
    assert layer.tasks == {}
    with pytest.raises(ValueError, match="at least one expert"):
        layer.remove([4, 6])
    with pytest.raises(ValueError, match=r"among \[4, 6\], got \[3\]"):
        layer.freeze([3])


def test_adding_leaves_existing_parameters_alone():
    layer = make()
    before = {name: (p, p.detach().clone()) for name, p in layer.named_parameters()}
    layer.add_experts(3, tasks=[1, 2])
    after = dict(layer.named_parameters())
    for name, (p, value) in before.items():
        assert after[name] is p
        assert torch.equal(p, value)
    assert len(after) == 2 * len(before)
    assert layer.tasks == {1: (4, 5, 6), 2: (4, 5, 6)}
    layer.add_experts(1, tasks=1)
    assert list(layer.tasks.items()) == [(2, (4, 5, 6)), (1, (4, 5, 6, 7))]  # in order of assignment
    layer.assign([0], 2)
    assert list(layer.tasks.items()) == [(1, (4, 5, 6, 7)), (2, (0,))]
    assert layer.structure()["tasks"] == [[1, [4, 5, 6, 7]], [2, [0]]]


@pytest.mark.parametrize("kind", ["ffn", "linear"])
def test_initial_values(kind):
    layer = make("task_table", expert={"name": kind, "activation": "gelu"})
    x = torch.randn(TOKENS, DIM)
    for task, expert in ((0, 2), (1, 1)):
        layer.assign([expert], task)
    for task in (0, 0, 1):
        layer(x, RouteContext(task=task))
    assert layer.usage == {2: 2 * TOKENS, 1: TOKENS}
    [most], [given], [zero], [fresh] = (
        layer.add_experts(1, "copy"),
        layer.add_experts(1, "copy", source=1),
        layer.add_experts(1, "zero"),
        layer.add_experts(1),
    )
    for task, expert in enumerate((2, most, 1, given, zero, fresh)):
        layer.assign([expert], task)
    y = [layer(x, RouteContext(task=task))[0] for task in range(6)]
    torch.testing.assert_close(y[0], y[1])
    torch.testing.assert_close(y[2], y[3])
    assert not torch.allclose(y[5], y[0])
    y[4].sum().backward()
    assert torch.equal(y[4], torch.zeros_like(y[4]))
    assert layer.cohorts[layer.view.where[zero][0]].stacked()[-2].grad.abs().sum() > 0  # and it can learn
    with pytest.raises(ValueError, match="relu"):
        make("task_table", expert={"name": "linear"}).add_experts(1, "zero")


@pytest.mark.parametrize("router", ["topk", "task_table", {"name": "topk", "noise": "shazeer"}])
@pytest.mark.parametrize("start", [1, 4])
def test_state_dict_round_trip_across_structure_changes(router, start):
    layer = make(router).double()
    layer.add_experts(3, tasks=[5])
    layer.freeze([1, 5])
    layer.remove([2, 4])
    layer.assign([0, 3], 6)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    layer(x, RouteContext(task=6))

    file = io.BytesIO()
    torch.save({"structure": layer.structure(), "weights": layer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved["structure"])) == layer.structure()

    other = MoELayer(DIM, HIDDEN, experts=start, router=router).double()
    state = torch.get_rng_state()
    other.restore_structure(saved["structure"])
    assert torch.equal(torch.get_rng_state(), state)
    other.load_state_dict(saved["weights"])
    assert other.structure() == layer.structure()
    assert other.ids == layer.ids
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert all(p.dtype == torch.float64 for p in other.parameters())
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]
    for task in (5, 6):
        a, b = (one.eval()(x, RouteContext(task=task))[0] for one in (layer, other))
        assert torch.equal(a, b)
    assert layer.add_experts(1) == other.add_experts(1)
    assert layer.cohort_ids == other.cohort_ids


def test_restoring_the_same_structure_keeps_the_parameters():
    layer = make()
    layer.add_experts(1)
    before = list(layer.parameters())
    layer.restore_structure(layer.structure())
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))


def test_deepcopy_is_independent():
    layer = make()
    other = copy.deepcopy(layer)
    other.add_experts(1)
    other.freeze([0])
    assert layer.ids == (0, 1, 2, 3)
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("order", ["before", "after"])
def test_part_of_a_cohort_visible_is_as_if_the_others_did_not_exist(order):
    layer = make({"name": "topk", "k": 2, "order": order})
    other = copy.deepcopy(layer)
    other.remove([0, 3])
    x = torch.randn(TOKENS, DIM)
    y, routing = layer(x, RouteContext(visible=(2, 1)))
    y_other, routing_other = other(x)
    assert routing.columns == (1, 2)
    assert torch.equal(routing.ids, routing_other.ids)
    torch.testing.assert_close(y, y_other, rtol=1e-5, atol=1e-6)


def test_errors_say_what_was_expected():
    x = torch.randn(TOKENS, DIM)
    table = make({"name": "task_table", "unassigned": "error"})
    with pytest.raises(ValueError, match="no expert is assigned to task 3"):
        table(x, RouteContext(task=3))
    with pytest.raises(ValueError, match="task label"):
        table(x)
    with pytest.raises(ValueError, match=r"context\.task: expected 29 values"):
        table(x, RouteContext(task=torch.zeros(7, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"visible: expected expert ids among .* got \[9\]"):
        make()(x, RouteContext(visible=(0, 9)))
    with pytest.raises(ValueError, match="router: expected one of"):
        MoELayer(DIM, router="topp")
    with pytest.raises(ValueError, match="grouped takes float32"):
        make(dispatch="grouped").double()(x.double())
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        MoELayer(6, 6, dispatch="grouped")(torch.randn(4, 6))
    for wrong in ({"k": 0}, {"order": "never"}, {"load": 0.1}):
        with pytest.raises(ValueError, match="topk: "):
            MoELayer(DIM, router={"name": "topk", **wrong})


def test_unassigned_tasks():
    x = torch.randn(TOKENS, DIM)
    layer = make("task_table")
    assert [layer(x, RouteContext(task=t))[1].experts for t in range(6)] == [(0,), (1,), (2,), (3,), (0,), (1,)]
    layer.add_experts(3, tasks=[1])
    assert [layer(x, RouteContext(task=t))[1].experts for t in (0, 1, 5)] == [(0,), (4, 5, 6), (1,)]
    latest = make({"name": "task_table", "unassigned": "latest"})
    latest.assign([2], 0)
    latest.assign([1], 1)
    latest.assign([3], 0)
    assert latest(x, RouteContext(task=9))[1].experts == (3,)
    assert set(latest(x, RouteContext(task=torch.tensor([0, 9] * 14 + [1])))[1].ids.flatten().tolist()) == {1, 3}
