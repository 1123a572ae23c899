"""Experts that begin as others, become one, or go by their use; the state of optimizers along with them."""

from __future__ import annotations

import copy

import pytest
import torch

from cmoe.moe import ROUTERS, MoELayer, ParameterChange, RouteContext, carry_state, migrate_optimizer
from cmoe.moe.alignment import reordered
from cmoe.moe.lifecycle import routed

DIM, HIDDEN, TOKENS = 16, 24, 31
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def make(router="topk", experts=4, **options):
    layer = MoELayer(DIM, HIDDEN, experts=experts, router=router, **options).double()
    with torch.no_grad():
        for p in layer.router.parameters():
            p.normal_(0, 0.5)
    return layer


def tokens(seed=0, count=TOKENS):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(layer, expert, x):
    key, row = layer.view.where[expert]
    return layer.cohorts[key].single(x, row).detach()


def weights_of(layer, expert):
    key, row = layer.view.where[expert]
    return {name: p.detach()[row] for name, p in layer.cohorts[key].named_parameters()}


def columns_of(layer, expert):
    key, row = layer.view.where[expert]
    return layer.router.columns[key].weight.detach()[row]


def train(layer, optimizer, steps=3, context=None):
    for seed in range(steps):
        optimizer.zero_grad()
        y, routing = layer(tokens(seed), context)
        (y.square().sum() + sum(routing.aux.values())).backward()
        optimizer.step()


# -- what new experts begin with -----------------------------------------------------------------------------------------


def test_the_nearest_is_whoever_the_router_gives_most_of_the_tokens():
    layer = make({"name": "topk", "k": 2}).train()
    x = tokens(5)
    weights = torch.zeros(4, dtype=torch.float64)
    layer.eval()
    _, routing = layer(x)
    weights.index_add_(0, routing.ids.flatten(), routing.weights.detach().flatten())
    layer.train()
    before, usage = torch.get_rng_state(), dict(layer.usage)
    found = routed(layer, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.usage == usage
    assert layer.router.training
    assert [found[e] for e in range(4)] == pytest.approx(weights.tolist())
    state = torch.get_rng_state()
    [new] = layer.add_experts(1, "nearest", tokens=x)
    drawn = torch.get_rng_state()
    assert torch.equal(alone(layer, new, x), alone(layer, int(weights.argmax()), x))
    torch.set_rng_state(state)
    make_columns = layer.router.new_columns(1)
    layer.router.reset_columns(make_columns)
    assert torch.equal(torch.get_rng_state(), drawn)  # nothing was drawn but the router's column


@pytest.mark.parametrize("router", ["soft", "smear", "task_table", "expert_choice", "top_p", "relu"])
def test_every_kind_of_routing_says_whom_it_gives_most(router):
    layer = make(router)
    found = routed(layer, tokens(1), RouteContext(task=2, sequence=torch.zeros(TOKENS, dtype=torch.int64)))
    assert set(found) <= set(layer.ids)
    assert max(found.values()) > 0
    if router == "task_table":
        assert found == {2: TOKENS}


def test_interpolated_experts_are_means_weighted_by_use():
    layer = make("task_table")
    for task, expert in ((0, 1), (1, 3)):
        layer.assign([expert], task)
    for task in (0, 0, 0, 1):
        layer(tokens(), RouteContext(task=task))
    [given] = layer.add_experts(1, "interpolated", sources=[0, 2], align=False)  # never used: equal
    [used] = layer.add_experts(1, "interpolated", sources=[1, 3], align=False)
    [numbers] = layer.add_experts(1, "interpolated", sources=[1, 3], weights=[3, 1], align=False)
    [equal] = layer.add_experts(1, "interpolated", sources=[1, 3], weights=None, align=False)
    w = {e: weights_of(layer, e) for e in layer.ids}
    for name in w[0]:
        torch.testing.assert_close(w[given][name], (w[0][name] + w[2][name]) / 2)
        torch.testing.assert_close(w[used][name], (3 * w[1][name] + w[3][name]) / 4)
        torch.testing.assert_close(w[equal][name], (w[1][name] + w[3][name]) / 2)
        assert torch.equal(w[numbers][name], w[used][name])
    [all_of_them] = layer.add_experts(1, "interpolated")
    assert weights_of(layer, all_of_them).keys() == w[0].keys()


@pytest.mark.parametrize("init", ["copy", "nearest", "interpolated"])
def test_noise_makes_copies_differ_by_as_much(init):
    layer = make()
    layer(tokens())
    x = tokens(1)
    exact = layer.add_experts(2, init, tokens=x)
    noisy = layer.add_experts(64, init, tokens=x, noise=0.1, source=None)
    assert torch.equal(alone(layer, exact[0], x), alone(layer, exact[1], x))
    key = layer.view.where[noisy[0]][0]
    for name, p in layer.cohorts[key].named_parameters():
        origin = weights_of(layer, exact[0])[name] if init != "interpolated" else p.detach().mean(0)
        apart = (p.detach() - origin).flatten(1)
        spread = apart.std() / weights_of(layer, exact[0])[name].std(correction=0)
        assert 0.09 < float(spread) < 0.11, name
    assert not torch.equal(alone(layer, noisy[0], x), alone(layer, noisy[1], x))


def test_copies_are_exact_in_every_type():
    for dtype in (torch.float64, torch.bfloat16):
        layer = MoELayer(DIM, HIDDEN, experts=2).to(dtype)
        [new] = layer.add_experts(1, "copy", source=1)
        assert all(torch.equal(v, weights_of(layer, new)[n]) for n, v in weights_of(layer, 1).items())
        assert all(p.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("options", [{"init": "copy", "source": 4}, {"init": "interpolated", "sources": [4, 5]}])
def test_copies_are_of_the_kind_of_what_they_copy(options):
    layer = make(more=[{"experts": 2, "hidden": 8}])
    [new] = layer.add_experts(1, weights=None, align=False, **options)
    assert layer.cohorts[layer.view.where[new][0]].hidden == 8
    means = {n: (v + weights_of(layer, 5)[n]) / 2 for n, v in weights_of(layer, 4).items()}
    wanted = weights_of(layer, 4) if options["init"] == "copy" else means
    assert all(torch.equal(v, wanted[n]) for n, v in weights_of(layer, new).items())
    with pytest.raises(ValueError, match="same kind, got 4"):
        layer.add_experts(1, "interpolated", sources=[0, 4])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "nearest"}, "nearest needs tokens"),
        ({"init": "nowhere"}, "init: expected one of"),
        ({"init": "fresh", "noise": 0.1}, "noise: expected 0 with init 'fresh'"),
        ({"init": "copy", "noise": -1}, "noise: expected"),
        ({"init": "copy", "source": 9}, r"among \[0, 1, 2, 3\], got \[9\]"),
        ({"init": "copy", "hidden": 5}, "first experts of a kind"),
        ({"init": "interpolated", "sources": [0, 1], "weights": [1.0]}, "weights: expected 2 numbers"),
        ({"init": "interpolated", "sources": [0, 1], "weights": [1.0, -1.0]}, "weights: expected 2 numbers"),
        ({"init": "interpolated", "sources": [0, 1], "weights": "use"}, "weights: expected numbers"),
    ],
)
def test_what_cannot_be_added_is_refused_and_changes_nothing(options, says):
    layer = make()
    before = layer.structure()
    with pytest.raises(ValueError, match=says):
        layer.add_experts(1, **options)
    assert layer.structure() == before | {"kinds": layer.structure()["kinds"]}


# -- merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ffn", {"name": "ffn", "activation": "swiglu"}, "linear"])
@pytest.mark.parametrize("align", [True, False])
def test_equal_experts_merge_into_the_same_bit_for_bit(kind, align):
    layer = make(expert=kind)
    layer(tokens())
    others = layer.add_experts(2, "copy", source=1)
    for key, row in (layer.view.where[e] for e in (1, *others)):
        with torch.no_grad():
            layer.router.columns[key].weight[row] = layer.router.columns["0"].weight[2]
    x, before = tokens(3), {e: alone(layer, e, tokens(3)) for e in (0, 1, 2, 3)}
    column = columns_of(layer, 1).clone()
    new, _ = layer.merge([1, *others], weights=[0.3, 0.3, 0.4], align=align)
    assert layer.ids == (0, 2, 3, new)
    assert torch.equal(alone(layer, new, x), before[1])
    assert torch.equal(columns_of(layer, new), column)
    assert all(torch.equal(alone(layer, e, x), before[e]) for e in (0, 2, 3))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_copy_in_another_order_merges_as_if_it_were_in_the_same(activation):
    layer = make(expert={"name": "ffn", "activation": activation}, experts=2)
    units, order = layer.cohorts["0"].units(), torch.randperm(HIDDEN)
    with torch.no_grad():
        for name, p in layer.cohorts["0"].named_parameters():
            p[1] = reordered(p[0].clone(), *units[name], order) if name in units else p[0]
    x = tokens()
    before = alone(layer, 0, x)
    mixed = copy.deepcopy(layer)
    new, _ = mixed.merge([0, 1], align=False)
    assert (alone(mixed, new, x) - before).abs().max() > 1e-3  # what averaging as they stand does
    new, _ = layer.merge([0, 1])
    assert torch.equal(alone(layer, new, x), before)


def test_alignment_keeps_what_two_similar_experts_do():
    noisy = make(experts=2)
    units, order = noisy.cohorts["0"].units(), torch.randperm(HIDDEN)
    with torch.no_grad():
        for name, p in noisy.cohorts["0"].named_parameters():
            p[1] = reordered(p[0] + 0.02 * torch.randn_like(p[0]), *units[name], order) if name in units else p[0]
    x = tokens(9)
    target = (alone(noisy, 0, x) + alone(noisy, 1, x)) / 2
    errors = []
    for align in (True, False):
        one = copy.deepcopy(noisy)
        new, _ = one.merge([0, 1], weights=None, align=align)
        errors.append(float((alone(one, new, x) - target).norm() / target.norm()))
    assert errors[0] < 0.05 < 0.5 < errors[1]


def test_the_merged_expert_takes_over_tasks_use_and_frozenness():
    layer = make("task_table", experts=5)
    layer.assign([0], 0)
    layer.assign([2, 1, 3], 1)
    layer.assign([4], 2)
    for task in (0, 1, 1):
        layer(tokens(), RouteContext(task=task))
    new, _ = layer.merge([1, 0])
    assert new == 5
    assert layer.tasks == {0: (5,), 1: (2, 5, 3), 2: (4,)}
    assert layer.usage == {5: TOKENS + 2 * TOKENS, 2: 2 * TOKENS, 3: 2 * TOKENS}
    assert not layer.frozen_ids
    layer.freeze([2, 3, 4])
    both, _ = layer.merge([2, 3])
    assert both in layer.frozen_ids
    assert not any(p.requires_grad for p in layer.cohorts[layer.view.where[both][0]].parameters())
    one, _ = layer.merge([both, 5])  # one of them goes on learning
    assert one not in layer.frozen_ids
    assert layer.ids == (4, one)
    last, _ = layer.merge([4, one])
    assert layer.ids == (last,)
    assert layer(tokens(), RouteContext(task=1))[0].shape == (TOKENS, DIM)


def test_what_cannot_be_merged_is_refused_and_changes_nothing():
    layer = make(more=[{"experts": 1, "hidden": 8}])
    before = layer.structure(), [p.detach().clone() for p in layer.parameters()]
    for ids, says in (
        ([1], "at least two"),
        ([1, 1], "at least two"),
        ([0, 4], "one kind and size"),
        ([0, 9], r"got \[9\]"),
    ):
        with pytest.raises(ValueError, match=says):
            layer.merge(ids)
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        layer.merge([0, 1], weights=[0.0, 0.0])
    assert layer.structure() == before[0]
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before[1], strict=True))


def needs(router):
    """A context with everything that a router may ask for."""
    return RouteContext(
        task=1,
        token_ids=torch.arange(TOKENS),
        sequence=torch.zeros(TOKENS, dtype=torch.int64),
        position=torch.arange(TOKENS),
    )


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_lives_through_it(router):
    """Merging and pruning leave a router that routes, whose columns are as many as the experts, and a way back."""
    torch.manual_seed(0)
    layer = MoELayer(DIM, HIDDEN, experts=6, router=router)
    context = needs(router)
    layer(tokens().float(), context)
    _, change = layer.merge([1, 4])
    assert set(change) <= set(layer.parameters())
    if sum(layer.usage.values()):
        layer.prune(keep=3)
        assert len(layer.ids) == 3
    y, routing = layer(tokens(1).float(), context)
    assert y.isfinite().all()
    assert set(routing.columns) <= set(layer.ids)
    loss = y.sum() + sum(routing.aux.values())
    if loss.requires_grad:
        loss.backward()
    other = MoELayer(DIM, HIDDEN, experts=6, router=router)
    other.restore_structure(layer.structure())
    other.load_state_dict(layer.state_dict())
    state = torch.get_rng_state()
    layer.eval(), other.eval()
    a = layer(tokens(2).float(), context)[0]
    torch.set_rng_state(state)
    assert torch.equal(a, other(tokens(2).float(), context)[0])


# -- optimizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["migrate", "carry"])
def test_state_is_averaged_as_the_weights_are(name, how):
    layer = make({"name": "topk", "k": 2})
    optimizer = OPTIMIZERS[name](layer.parameters())
    train(layer, optimizer)
    old = {n: dict(optimizer.state[p]) for n, p in layer.cohorts["0"].named_parameters()}
    column = dict(optimizer.state[layer.router.columns["0"].weight])
    new, change = layer.merge([0, 3], weights=[3, 1], align=False)
    if how == "migrate":
        migrate_optimizer(optimizer, change, added=layer.parameters())
    else:
        anew = OPTIMIZERS[name](layer.parameters())
        carry_state(optimizer, anew, change)
        optimizer = anew
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(held) == set(layer.parameters())
    assert len(held) == len(set(held))
    key, _ = layer.view.where[new]
    pairs = [(p, old[n]) for n, p in layer.cohorts[key].named_parameters()]
    pairs.append((layer.router.columns[key].weight, column))
    for p, before in pairs:
        now = optimizer.state[p]
        assert now.keys() == before.keys()
        for field, value in before.items():
            if isinstance(value, torch.Tensor) and value.dim():
                torch.testing.assert_close(now[field], (0.75 * value[0] + 0.25 * value[3]).unsqueeze(0), msg=field)
            elif value is not None:
                assert float(now[field]) == float(value), field
    rest, _ = layer.view.where[1]
    for n, p in layer.cohorts[rest].named_parameters():  # the survivors', bit for bit
        for field, value in old[n].items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert torch.equal(optimizer.state[p][field], value[1:3]), field
    train(layer, optimizer)


def test_state_of_units_in_another_order_is_put_in_order_too():
    layer = make({"name": "topk", "k": 2}, experts=2)
    optimizer = OPTIMIZERS["adam"](layer.parameters())
    train(layer, optimizer)
    cohort = layer.cohorts["0"]
    units, order = cohort.units(), torch.randperm(HIDDEN)
    with torch.no_grad():
        for name, p in cohort.named_parameters():
            for value in (p, *(v for v in optimizer.state[p].values() if v.dim())):
                value[1] = reordered(value[0].clone(), *units[name], order) if name in units else value[0]
    before = {
        n: {k: v[0].clone() for k, v in optimizer.state[p].items() if v.dim()} for n, p in cohort.named_parameters()
    }
    new, change = layer.merge([0, 1])
    migrate_optimizer(optimizer, change, added=layer.parameters())
    key, _ = layer.view.where[new]
    for name, p in layer.cohorts[key].named_parameters():
        for field, value in before[name].items():
            torch.testing.assert_close(optimizer.state[p][field][0], value, rtol=1e-12, atol=1e-15)


def test_an_expert_without_a_past_makes_the_merged_one_begin_anew():
    layer = make()
    optimizer = OPTIMIZERS["adam"](layer.parameters())
    train(layer, optimizer)
    [late] = layer.add_experts(1)
    migrate_optimizer(optimizer, ParameterChange(), added=layer.parameters())
    new, change = layer.merge([0, late])
    migrate_optimizer(optimizer, change, added=layer.parameters())
    key, _ = layer.view.where[new]
    assert all(p not in optimizer.state for p in layer.cohorts[key].parameters())
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(layer.parameters())
    train(layer, optimizer)


def test_changes_of_all_kinds_add_up():
    """Split, merge, merge again: one change from the first parameters to the last gives the state of going step by step."""
    layer = make({"name": "topk", "k": 3}, experts=5)
    optimizer = OPTIMIZERS["adam"](layer.parameters())
    train(layer, optimizer, 4)
    before = copy.copy(dict(optimizer.state))
    first = list(layer.parameters())
    total = layer.freeze([1])
    migrate_optimizer(optimizer, total, added=layer.parameters())
    for operation in (
        lambda: layer.thaw([1]),
        lambda: layer.merge([1, 2])[1],
        lambda: layer.remove([0]),
        lambda: layer.merge([3, 5], weights=[1, 2])[1],
    ):
        change = operation()
        migrate_optimizer(optimizer, change, added=layer.parameters())
        total = total + change
    assert {p for p in total.removed if p in set(first)} == {p for p in first if p not in set(layer.parameters())}
    assert set(total) == set(layer.parameters()) - set(first)
    stepwise = {n: dict(optimizer.state[p]) for n, p in layer.named_parameters()}
    at_once = OPTIMIZERS["adam"](first)
    at_once.state.update(before)
    migrate_optimizer(at_once, total, added=layer.parameters())
    for n, p in layer.named_parameters():
        assert at_once.state[p].keys() == stepwise[n].keys()
        for field, value in stepwise[n].items():
            torch.testing.assert_close(at_once.state[p][field], value, rtol=1e-12, atol=1e-18)


# -- pruning -------------------------------------------------------------------------------------------------------------


def used(counts, **options):
    layer = make("task_table", experts=len(counts), dispatch="loop", **options)
    layer.usage.update({e: n for e, n in enumerate(counts) if n})
    return layer


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 2}, (1, 3)),
        ({"keep": 1}, (3,)),
        ({"keep": 9}, (0, 1, 2, 3)),
        ({"below": 0.2}, (1, 3)),
        ({"below": 0.0}, (0, 1, 2, 3)),
        ({"below": 1.0}, (3,)),
    ],
)
def test_the_least_used_go(options, left):
    layer = used([0, 30, 10, 60])
    before = {e: alone(layer, e, tokens()) for e in layer.ids}
    gone, change = layer.prune(**options)
    assert layer.ids == left
    assert sorted([*gone, *left]) == [0, 1, 2, 3]
    assert bool(change) == bool(gone)
    assert all(torch.equal(alone(layer, e, tokens()), before[e]) for e in left)


def test_experts_of_tasks_stay_unless_told_otherwise():
    layer = used([1, 30, 10, 60])
    layer.assign([0], 0)
    layer.assign([2], 1)
    assert layer.prune(keep=1)[0] == [1]
    assert layer.ids == (0, 2, 3)
    assert layer.prune(keep=1, assigned=True)[0] == [0, 2]
    assert layer.tasks == {}


def test_pruning_needs_use_and_one_limit():
    for options, says in (
        ({}, "one of keep and below"),
        ({"keep": 1, "below": 0.1}, "one of"),
        ({"keep": 0}, "from 1"),
        ({"below": 2.0}, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=says):
            used([1, 2]).prune(**options)
    layer = used([3, 5])
    layer.reset_usage()
    assert layer.usage == {}
    with pytest.raises(ValueError, match="use was counted"):
        layer.prune(keep=1)
    layer(tokens(), RouteContext(task=1))
    assert layer.prune(keep=1)[0] == [0]
