"""Bottleneck adapters as experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmoe.moe import MoELayer, RouteContext

from .kinds import DIM, UNITS, spoken


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh", "swiglu"])
def test_at_the_start_nothing_changes_and_gradients_reach_the_second_map(activation):
    base = nn.Linear(DIM, DIM).requires_grad_(False)
    layer = MoELayer(DIM, expert={"name": "adapter", "bottleneck": 3, "activation": activation}, base=base)
    layer.add_experts(1)
    x = torch.randn(UNITS, DIM)
    y, _ = layer(x)
    assert torch.equal(y, base(x))
    y.square().sum().backward()
    assert layer.cohorts["0"].w2.grad.abs().sum() > 0
    assert base.weight.grad is None


def test_it_is_the_bottleneck_of_the_paper_beside_the_network():
    layer = MoELayer(DIM, expert={"name": "adapter", "bottleneck": 5, "activation": "relu"}, router="task_table")
    layer.base = nn.Linear(DIM, DIM)
    spoken(layer).double()
    x = torch.randn(UNITS, DIM, dtype=torch.float64)
    cohort = layer.cohorts["0"]
    assert cohort.w1.shape == (4, DIM, 5)
    down = nn.functional.relu(x @ cohort.w1[2] + cohort.b1[2])
    expected = layer.base(x) + down @ cohort.w2[2] + cohort.b2[2]
    torch.testing.assert_close(layer(x, RouteContext(task=2))[0], expected, rtol=1e-12, atol=1e-12)


def test_the_layers_hidden_units_are_not_the_bottlenecks():
    layer = MoELayer(DIM, 512, expert={"name": "adapter", "bottleneck": 5})
    assert layer.cohorts["0"].hidden == 5
    assert MoELayer(DIM, expert="adapter").cohorts["0"].hidden == 64
