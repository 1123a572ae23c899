"""Loads, balance and costs on routings made by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from cmoe.moe import MoELayer, RouteContext, Routing, diagnostics
from cmoe.moe.losses import cv_squared


def test_loads():
    ids = torch.tensor([[3, 7], [3, -1], [7, 3], [-1, -1]])
    routing = Routing(ids=ids, weights=torch.zeros(4, 2), columns=(3, 5, 7))
    counts = diagnostics.load(routing)
    assert counts == {3: 3, 5: 0, 7: 2}
    assert diagnostics.dead(counts) == [5]
    assert diagnostics.max_over_mean(counts) == pytest.approx(3 / (5 / 3))
    assert diagnostics.load_entropy(counts) == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert diagnostics.add_loads([counts, {3: 1, 9: 2}]) == {3: 4, 5: 0, 7: 2, 9: 2}
    assert diagnostics.router_entropy(routing) is None
    assert math.isnan(diagnostics.max_over_mean({1: 0}))
    assert math.isnan(diagnostics.load_entropy({1: 0}))


def test_router_entropy_leaves_padding_out():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    routing = Routing(ids=torch.tensor([[0], [-1]]), weights=torch.zeros(2, 1), logits=logits, columns=(0, 1))
    assert diagnostics.router_entropy(routing) == pytest.approx(math.log(2))


def test_counts_of_parameters_and_operations():
    layer = MoELayer(8, 16, 24, experts=5, router={"name": "topk", "k": 2})
    expert = 8 * 16 + 16 + 16 * 24 + 24
    assert layer.parameter_counts() == (5 * expert + 5 * 8, 2 * expert + 5 * 8)
    assert diagnostics.flops_per_token(layer) == 2 * 2 * (8 * 16 + 16 * 24) + 2 * 5 * 8
    table = MoELayer(8, out_dim=24, experts=5, expert="linear", router="task_table")
    assert table.parameter_counts() == (5 * (8 * 24 + 24), 8 * 24 + 24)
    table.assign([0, 1, 2], 0)
    assert table.parameter_counts()[1] == 3 * (8 * 24 + 24)


def test_usage_counts_training_only():
    layer = MoELayer(8, 16, experts=3, router={"name": "topk", "k": 2})
    x = torch.randn(10, 8)
    _, routing = layer(x)
    layer.eval()
    layer(x)
    assert {e: n for e, n in diagnostics.load(routing).items() if n} == layer.usage
    assert sum(layer.usage.values()) == 20
    assert diagnostics.load(MoELayer(8, 16, router="task_table")(x, RouteContext(task=1))[1]) == {
        0: 0,
        1: 10,
        2: 0,
        3: 0,
    }


@pytest.mark.parametrize("labels", [0, torch.arange(12) % 2], ids=["one label", "a label a token"])
@pytest.mark.parametrize("drop", ["order", "weight"])
def test_assignments_lost_to_capacity_are_counted(labels: int | torch.Tensor, drop: str) -> None:
    x = torch.randn(12, 8)
    free = MoELayer(8, 16, experts=3, router={"name": "topk", "k": 2, "restrict": "task"})
    free.assign([0, 1], 0)
    free.assign([0, 2], 1)
    full = MoELayer(
        8, 16, experts=3, router={"name": "topk", "k": 2, "restrict": "task", "capacity": 0.6, "drop": drop}
    )
    full.restore_structure(free.structure())
    full.load_state_dict(free.state_dict())
    before, after = (layer(x, RouteContext(task=labels))[1] for layer in (free, full))
    assert before.dropped is None
    assert int(after.dropped.sum()) == int((before.ids >= 0).sum()) - int((after.ids >= 0).sum()) > 0


def test_load_cv_is_the_root_of_the_loss() -> None:
    assert diagnostics.load_cv({0: 5, 1: 5, 4: 5}) == 0
    assert diagnostics.load_cv({0: 9, 1: 0, 4: 0}) == pytest.approx(math.sqrt(2))
    assert diagnostics.load_cv({3: 2}) == 0
    assert math.isnan(diagnostics.load_cv({0: 0, 1: 0}))
    counts = [3, 0, 7, 11]
    loss = cv_squared(torch.tensor(counts, dtype=torch.float64))
    assert diagnostics.load_cv(dict(enumerate(counts))) == pytest.approx(math.sqrt(loss))


@pytest.mark.parametrize("capacity", [0.0, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_a_flow_is_the_sum_of_its_batches(capacity: float, padded: bool) -> None:
    layer = MoELayer(8, 16, experts=4, router={"name": "topk", "k": 2, "init_std": 1.0, "capacity": capacity}).eval()
    x = torch.randn(3, 10, 8)
    valid = torch.arange(10) < 7 if padded else torch.ones(10, dtype=torch.bool)
    routings = [layer(batch, RouteContext(valid=valid))[1] for batch in x]
    total = sum((diagnostics.Flow.of(r) for r in routings[1:]), diagnostics.Flow.of(routings[0]))
    ids = torch.stack([r.ids for r in routings])
    assert {e: n for e, n in total.load.items() if n} == {
        e: int((ids == e).sum()) for e in range(4) if (ids == e).any()
    }
    assert total.tokens == 3 * int(valid.sum())
    assert total.unserved == int(((ids < 0).all(2) & valid).sum())
    shares = torch.stack([r.logits.detach() for r in routings]).double().softmax(-1)[:, valid]
    expected = float(-(shares * shares.log()).sum(-1).mean())
    assert total.mean_entropy == pytest.approx(expected)
    assert total.unserved_share == pytest.approx(total.unserved / total.tokens)
    if capacity:
        lost = 2 * total.tokens - int((ids >= 0).sum())
        assert total.dropped_share == pytest.approx(lost / (2 * total.tokens))
        assert lost > 0
    else:
        assert total.dropped_share is None
    assert diagnostics.Flow.of(routings[0], entropy=False).mean_entropy is None


def test_an_empty_flow_has_no_shares() -> None:
    empty = diagnostics.Flow()
    assert empty.mean_entropy is empty.dropped_share is empty.unserved_share is None
    layer = MoELayer(8, 16, experts=2)
    assert math.isnan(diagnostics.active_flops(layer, {}, 0))
    flow = diagnostics.Flow.of(layer(torch.zeros(0, 8))[1])
    assert flow == diagnostics.Flow(dropped=None)


def test_only_assignments_flow() -> None:
    routing = Routing(ids=torch.zeros(2, 1, dtype=torch.int64), weights=torch.ones(2, 1), kind="soft")
    with pytest.raises(ValueError, match="expected kind 'sparse', got 'soft'"):
        diagnostics.Flow.of(routing)


def test_operations_are_those_that_were_done() -> None:
    layer = MoELayer(8, 16, experts=3, router={"name": "topk", "k": 2}).eval()
    _, routing = layer(torch.randn(10, 8))
    flow = diagnostics.Flow.of(routing)
    assert diagnostics.active_flops(layer, flow.load, flow.tokens) == diagnostics.flops_per_token(layer)
    more = MoELayer(8, 16, experts=3, router={"name": "topk", "k": 2}, shared=1, base=torch.nn.Linear(8, 8))
    own = 2 * (8 * 16 + 16 * 8) + 2 * 8 * 8
    assert diagnostics.flops_per_token(more) == diagnostics.flops_per_token(layer) + own
    halved = {e: n / 2 for e, n in flow.load.items()}
    router = 2 * 3 * 8
    assert diagnostics.active_flops(layer, halved, 10) == (diagnostics.flops_per_token(layer) - router) / 2 + router


def test_the_package_needs_torch_alone():
    code = "import sys, cmoe.moe; print(sorted({'omegaconf', 'avalanche', 'timm', 'pytorch_lightning', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
