"""Operations on all layers of a model: what they report, and that nobody notices being observed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cmoe.moe import MoELayer, RouteContext, migrate_optimizer, surgery
from cmoe.moe.surgery import Event

DIM = 8


class Two(nn.Module):
    """Two layers of experts with what else a model may have."""

    def __init__(self, router="topk", experts=4, expert="ffn"):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.first = MoELayer(DIM, 12, experts=experts, expert=expert, router=router)
        self.drop = nn.Dropout(0.5)
        self.second = MoELayer(DIM, 12, experts=experts, expert=expert, router=router)

    def forward(self, x, context=None):
        h, _ = self.first(self.norm(x), context)
        return self.second(self.drop(h), context)[0]


def x_of(seed=0, count=40):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def two(**options):
    torch.manual_seed(0)
    model = Two(**options)
    for seed in range(3):
        model(x_of(seed))
    return model


def kinds(done):
    return [(e.kind, e.layer) for e in done.events]


def test_each_operation_acts_on_every_layer_and_says_what_it_did():
    model = two()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def do(done):
        migrate_optimizer(optimizer, done.change, added=model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == set(model.parameters())
        optimizer.zero_grad()
        model(x_of(7)).square().sum().backward()
        optimizer.step()
        return done

    do(surgery.Surgery())
    done = do(surgery.add_experts(model, 2, "copy", tasks=[3], noise=0.1))
    assert done.new == {"first": [4, 5], "second": [4, 5]}
    assert done.events == [Event("added", "first", (4, 5)), Event("added", "second", (4, 5))]
    assert model.first.tasks == model.second.tasks == {3: (4, 5)}
    done = do(surgery.freeze(model, {"first": [0, 1], "second": [5]}))
    assert done.events == [Event("frozen", "first", (0, 1)), Event("frozen", "second", (5,))]
    assert do(surgery.freeze(model, {"first": [0, 2]})).events == [Event("frozen", "first", (2,))]
    assert do(surgery.thaw(model, [0, 5])).events == [Event("thawed", "first", (0,)), Event("thawed", "second", (5,))]
    assert do(surgery.thaw(model)).events == [Event("thawed", "first", (1, 2))]
    assert kinds(do(surgery.assign(model, [1, 2], 0))) == [("assigned", "first"), ("assigned", "second")]
    done = do(surgery.merge(model, [1, 4]))
    assert done.events[:2] == [Event("merged", "first", (1, 4), 6), Event("added", "first", (6,))]
    assert done.new == {"first": [6], "second": [6]}
    assert model.first.tasks == {3: (6, 5), 0: (6, 2)}
    assert kinds(do(surgery.remove(model, {"second": [0]}))) == [("removed", "second")]
    done = do(surgery.prune(model, keep=2, assigned=True))
    assert {(e.kind, e.layer) for e in done.events} == {("removed", "first"), ("removed", "second")}
    assert [len(layer.ids) for layer in surgery.layers(model).values()] == [2, 2]
    surgery.reset_usage(model)
    assert model.first.usage == model.second.usage == {}
    total = surgery.freeze(model) + surgery.thaw(model)
    assert [e.kind for e in total.events] == ["frozen", "frozen", "thawed", "thawed"]


def test_what_frozen_experts_merge_into_is_reported_frozen():
    model = two()
    surgery.freeze(model, {"first": [0, 1, 2]})
    done = surgery.merge(model, {"first": [0, 1], "second": [0, 1]})
    assert [(e.kind, e.layer, e.experts) for e in done.events] == [
        ("merged", "first", (0, 1)),
        ("added", "first", (4,)),
        ("frozen", "first", (4,)),
        ("merged", "second", (0, 1)),
        ("added", "second", (4,)),
    ]


@pytest.mark.parametrize("pairs", ["unused", "used", "alike"])
@pytest.mark.parametrize("until", [1, 3, 9])
def test_pairs_are_merged_until_few_enough_are_left(pairs, until):
    model = two()
    use = {name: dict(layer.usage) for name, layer in surgery.layers(model).items()}
    done = surgery.merge(model, until=until, pairs=pairs, run=lambda: model(x_of(9)))
    for name, layer in surgery.layers(model).items():
        assert len(layer.ids) == min(until, 4)
        assert sum(layer.usage.values()) == sum(use[name].values())
    merged = [e for e in done.events if e.kind == "merged"]
    assert len(merged) == 2 * (4 - min(until, 4))
    if merged and pairs != "alike":
        first = merged[0]
        ranked = sorted(range(4), key=lambda e: ((-1 if pairs == "used" else 1) * use["first"].get(e, 0), e))
        assert set(first.experts) == set(ranked[:2])


def test_the_two_most_alike_are_those_whose_outputs_differ_least():
    model = two()
    with torch.no_grad():
        for p in model.second.cohorts["0"].parameters():
            p[3] = p[1] + 1e-3 * torch.randn_like(p[1])
    done = surgery.merge(model, until=3, pairs="alike", run=lambda: model(x_of(9)))
    assert [e.experts for e in done.events if e.kind == "merged" and e.layer == "second"] == [(1, 3)]


def test_observing_leaves_no_trace():
    model = two(router={"name": "topk", "noise": "shazeer"})
    model.drop.eval()  # modes are each module's own
    before = copy.deepcopy(model.state_dict())
    usage, modes = dict(model.first.usage), [m.training for m in model.modules()]
    random = torch.get_rng_state()

    def run():
        assert not model.first.training
        assert not torch.is_grad_enabled()
        torch.rand(10)
        model(x_of(3), RouteContext(valid=torch.arange(40) % 2 == 0))

    seen = surgery.observe(model, run, limit=15)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert model.first.usage == usage
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.first._forward_hooks
    assert {name: s.tokens.shape for name, s in seen.items()} == {"first": (15, DIM), "second": (15, DIM)}
    assert sum(seen["first"].mass.values()) == pytest.approx(20)  # weights sum to 1 for each valid token
    model.eval()
    y = model.first(seen["first"].tokens)[0]
    torch.testing.assert_close(y, seen["first"].outputs)

    def fails():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        surgery.observe(model, fails)
    assert not model.first._forward_hooks


def test_new_experts_nearest_to_data_are_copies_of_who_gets_it():
    model = two(router={"name": "topk", "k": 1, "order": "after"})
    x = x_of(11)
    seen = surgery.observe(model, lambda: model(x))
    done = surgery.add_experts(model, 1, "nearest", run=lambda: model(x))
    for name, layer in surgery.layers(model).items():
        source = max(range(4), key=lambda e: seen[name].mass[e])
        key, row = layer.view.where[done.new[name][0]]
        for p, old in zip(layer.cohorts[key].parameters(), layer.cohorts["0"].parameters(), strict=True):
            assert torch.equal(p[row], old[source])
    with pytest.raises(ValueError, match="nearest needs run"):
        surgery.add_experts(model, 1, "nearest")


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        (lambda m: surgery.freeze(m, {"third": [0]}), r"layers among \['first', 'second'\], got 'third'"),
        (lambda m: surgery.merge(m), "one of ids and until"),
        (lambda m: surgery.merge(m, until=0), "until: expected at least 1"),
        (lambda m: surgery.merge(m, until=2, pairs="alike"), "alike needs run"),
        (lambda m: surgery.merge(m, until=2, pairs="best"), "pairs: expected"),
        (lambda m: surgery.remove(m, [9]), "got \\[9\\]"),
        (lambda m: surgery.collapse(m, "mean"), "how: expected"),
        (lambda m: surgery.collapse(m, "distil"), "distil needs run"),
        (lambda m: surgery.collapse(m, where="third"), "got 'third'"),
        (lambda m: surgery.upcycle(m), "found none in Two"),
        (lambda m: surgery.prune(nn.Linear(2, 2), keep=1), "got Linear without any"),
    ],
)
def test_what_cannot_be_done_is_refused(operation, says):
    with pytest.raises(ValueError, match=says):
        operation(two())


def test_experts_without_weights_have_nothing_to_learn():
    model = two(expert="copy")
    done = surgery.collapse(model, "distil", run=lambda: model(x_of()))
    assert all(before == after for before, after in done.errors.values())
