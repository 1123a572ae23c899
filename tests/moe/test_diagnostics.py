"""Loads, balance and costs on routings made by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from cmoe.moe import MoELayer, RouteContext, Routing, diagnostics


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
    assert int(after.dropped) == int((before.ids >= 0).sum()) - int((after.ids >= 0).sum()) > 0


def test_the_package_needs_torch_alone():
    code = "import sys, cmoe.moe; print(sorted({'omegaconf', 'avalanche', 'timm', 'pytorch_lightning', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
