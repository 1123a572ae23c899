"""Random sequences of operations on a layer under training: what always holds."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmoe.moe import MoELayer, ParameterChange, RouteContext, carry_state, migrate_optimizer

DIM, HIDDEN, TOKENS = 8, 6, 23
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}
ROUTERS = [
    "topk",
    {"name": "topk", "k": 1, "order": "after"},
    {"name": "topk", "noise": "shazeer"},
    "task_table",
    "kmeans",
    {"name": "sigmoid_bias", "rate": 0.1},
    {"name": "stable_moe", "after": 4},
]

some_ids = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True)
operations = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 2), st.sampled_from(["fresh", "copy", "zero", "interpolated", "nearest"])),
    st.tuples(st.just("freeze"), some_ids),
    st.tuples(st.just("thaw"), some_ids),
    st.tuples(st.just("remove"), some_ids),
    st.tuples(st.just("merge"), some_ids),
    st.tuples(st.just("prune"), st.integers(1, 5), st.booleans()),
    st.tuples(st.just("assign"), some_ids, st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(0, 10**6)),
    st.tuples(st.just("save")),
)


def rows(layer):
    """{(expert, part, parameter): its row}."""
    return {
        (expert, part, name): p.detach()[row].clone()
        for part, modules in enumerate(layer.stacked_modules())
        for key, module in modules.items()
        for name, p in (*module.named_parameters(), *module.named_buffers())
        for row, expert in enumerate(layer.cohort_ids[key])
    }


def states(layer, optimizer):
    """{(expert, part, parameter, field): the row of what the optimizer keeps}."""
    return {
        (expert, part, name, field): value[row].clone() if value.dim() else value.clone()
        for part, modules in enumerate(layer.stacked_modules())
        for key, module in modules.items()
        for name, p in module.named_parameters()
        for field, value in optimizer.state.get(p, {}).items()
        if value is not None
        for row, expert in enumerate(layer.cohort_ids[key])
    }


class Life:
    """A layer with an optimizer, and what is known of its past."""

    def __init__(self, router, optimizer):
        torch.manual_seed(0)
        self.make = lambda: MoELayer(DIM, HIDDEN, experts=3, router=router).double()
        self.layer, self.build = self.make(), OPTIMIZERS[optimizer]
        with torch.no_grad():
            for p in self.layer.router.parameters():
                p.normal_(0, 0.5)
        self.optimizer = self.build(self.layer.parameters())
        self.known = set(self.layer.ids)
        self.step(0)

    def own(self, wanted):
        """The wanted ids, as places among the living."""
        ids = sorted(self.layer.ids)
        return sorted({ids[i % len(ids)] for i in wanted})

    def step(self, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, DIM, generator=g, dtype=torch.float64)
        task = int(torch.randint(0, 4, (1,), generator=g))
        self.optimizer.zero_grad()
        y, routing = self.layer(x, RouteContext(task=task))
        loss = y.square().sum() + sum(routing.aux.values())
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()

    def follow(self, change):
        migrate_optimizer(self.optimizer, change, added=self.layer.parameters())

    def do(self, operation):
        layer, what = self.layer, operation[0]
        if what == "step":
            frozen = {key: value for key, value in rows(layer).items() if key[0] in layer.frozen_ids}
            self.step(operation[1])
            now = rows(layer)
            assert all(torch.equal(now[key], value) for key, value in frozen.items()), "a frozen weight moved"
            return
        before, kept, ids = rows(layer), states(layer, self.optimizer), set(layer.ids)
        gone: set[int] = set()
        if what == "add":
            new = layer.add_experts(
                operation[1], operation[2], tokens=torch.randn(5, DIM).double(), context=RouteContext(task=1)
            )
            assert not set(new) & self.known, "an id came back"
            self.follow(ParameterChange())
        elif what in ("freeze", "thaw"):
            own = self.own(operation[1])
            self.follow(getattr(layer, what)(own))
            assert (set(own) <= layer.frozen_ids) if what == "freeze" else not set(own) & layer.frozen_ids
        elif what == "remove":
            gone = set(self.own(operation[1]))
            if gone == ids:
                with pytest.raises(ValueError, match="at least one expert"):
                    layer.remove(gone)
                gone = set()
            else:
                self.follow(layer.remove(gone))
        elif what == "merge":
            gone = set(self.own(operation[1]))
            if len(gone) < 2:
                with pytest.raises(ValueError, match="at least two"):
                    layer.merge(gone)
                gone = set()
            else:
                use, tasks = (
                    sum(layer.usage.get(e, 0) for e in gone),
                    {t for t, e in layer.tasks.items() if set(e) & gone},
                )
                frozen = gone <= layer.frozen_ids
                new, change = layer.merge(gone)
                self.follow(change)
                assert new not in self.known
                assert layer.usage.get(new, 0) == use
                assert {t for t, e in layer.tasks.items() if new in e} == tasks
                assert (new in layer.frozen_ids) == frozen
        elif what == "prune":
            if not sum(layer.usage.get(e, 0) for e in ids):
                return
            ranked = sorted(ids, key=lambda expert: (-layer.usage.get(expert, 0), expert))
            held = set() if operation[2] else {e for experts in layer.tasks.values() for e in experts}
            removed, change = layer.prune(keep=operation[1], assigned=operation[2])
            self.follow(change)
            gone = set(removed)
            assert gone == set(ranked[operation[1] :]) - held
        elif what == "assign":
            layer.assign(self.own(operation[1]), operation[2])
        elif what == "save":
            self.save()
            layer = self.layer
        assert ids - gone <= set(layer.ids), "an expert was lost"
        now, held = rows(layer), states(layer, self.optimizer)
        assert all(torch.equal(now[key], value) for key, value in before.items() if key[0] not in gone)
        assert all(torch.equal(held[key], value) for key, value in kept.items() if key[0] not in gone), "state was lost"

    def save(self):
        """As a run is resumed: built anew, structure and weights loaded, the optimizer's state carried on."""
        file = io.BytesIO()
        torch.save({"structure": self.layer.structure(), "weights": self.layer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = self.make()
        other.restore_structure(saved["structure"])
        other.load_state_dict(saved["weights"])
        assert other.structure() == self.layer.structure()
        names = dict(self.layer.named_parameters())
        pairs = ParameterChange({p: [(names[n], tuple(range(len(p))))] for n, p in other.named_parameters() if p.dim()})
        optimizer = self.build(other.parameters())
        carry_state(self.optimizer, optimizer, pairs)
        self.layer, self.optimizer = other, optimizer

    def check(self):
        layer = self.layer
        ids = [expert for experts in layer.cohort_ids.values() for expert in experts]
        assert ids, "a layer without experts"
        assert len(set(ids)) == len(ids)
        assert tuple(ids) == layer.ids == layer.view.ids
        self.known |= set(ids)
        assert max(self.known) < layer.structure()["next_expert"]
        assert set(layer.cohort_ids) == set(layer.cohorts) == set(layer.cohort_kinds)
        assert set(layer.router.columns) in (set(), set(layer.cohorts))
        for part in layer.stacked_modules():
            for key, module in part.items():
                assert all(p.shape[0] == len(layer.cohort_ids[key]) for p in module.parameters())
                assert all(p.requires_grad != (key in layer.frozen_keys) for p in module.parameters())
        assert {e for experts in layer.tasks.values() for e in experts} <= set(ids)
        assert all(experts for experts in layer.tasks.values())
        assert set(layer.usage) <= set(ids), "use of an expert that is gone"
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)), "a parameter twice in the optimizer"
        assert set(held) == set(layer.parameters())
        assert set(self.optimizer.state) <= set(held)
        for p, state in self.optimizer.state.items():
            assert all(v.shape in ((), p.shape) for v in state.values() if isinstance(v, torch.Tensor))


@settings(max_examples=120, deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    steps=st.lists(operations, min_size=1, max_size=9),
)
def test_whatever_is_done(router, optimizer, steps):
    life = Life(router, optimizer)
    life.check()
    for operation in steps:
        life.do(operation)
        life.check()
    copy.deepcopy(life.layer)(torch.randn(TOKENS, DIM, dtype=torch.float64), RouteContext(task=0))
    life.step(1)
    life.check()
