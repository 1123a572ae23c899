"""LoRA experts on a network that stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmoe.moe import MoELayer, RouteContext

from .kinds import DIM, UNITS, spoken

OUT, RANK, ALPHA = 12, 3, 7.0
SPEC = {"name": "lora", "rank": RANK, "alpha": ALPHA}


def on_frozen(router="task_table", **options):
    return MoELayer(DIM, 99, OUT, expert=SPEC, router=router, base=nn.Linear(DIM, OUT).requires_grad_(False), **options)


@pytest.mark.parametrize("router", ["topk", "task_table", "dense"])
def test_at_the_start_nothing_changes(router):
    layer = on_frozen(router)
    x = torch.randn(UNITS, DIM)
    assert torch.equal(layer(x, RouteContext(task=1))[0], layer.base(x))
    layer.add_experts(2)
    assert torch.equal(layer(x, RouteContext(task=1))[0], layer.base(x))


def test_an_expert_is_an_update_of_low_rank_to_the_weight():
    """h = W₀ x + (alpha / r) B A x (Hu et al. 2021, equation 3)."""
    layer = spoken(on_frozen(experts=3)).double()
    x = torch.randn(UNITS, DIM, dtype=torch.float64)
    for expert in range(3):
        layer.assign([expert], expert)
        cohort = layer.cohorts["0"]
        update = cohort.a[expert] @ cohort.b[expert] * (ALPHA / RANK)
        assert torch.linalg.matrix_rank(update) == RANK
        expected = nn.functional.linear(x, layer.base.weight + update.T, layer.base.bias)
        torch.testing.assert_close(layer(x, RouteContext(task=expert))[0], expected, rtol=1e-12, atol=1e-12)


def test_only_experts_learn_and_old_tasks_stay_bit_identical():
    layer = on_frozen(experts=1)
    layer.assign([0], 0)
    x = torch.randn(UNITS, DIM)

    def train(task):
        optim = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        losses = []
        for _ in range(60):
            optim.zero_grad()
            loss = (layer(x, RouteContext(task=task))[0] - (task + 1.0) * x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optim.step()
            losses.append(loss.item())
        return losses

    base = layer.base.weight.clone()
    losses = train(0)
    assert losses[-1] < 0.3 * losses[0]
    before = layer(x, RouteContext(task=0))[0]
    layer.freeze([0])
    layer.add_experts(1, tasks=[1])
    train(1)
    assert torch.equal(layer(x, RouteContext(task=0))[0], before)
    assert torch.equal(layer.base.weight, base)
    assert not torch.allclose(layer(x, RouteContext(task=1))[0], before)


def test_ranks_may_differ_in_a_layer():
    more = [{"experts": 2, "expert": {**SPEC, "rank": 5, "alpha": 5.0}}]
    layer = spoken(on_frozen("dense", experts=1, more=more)).double()
    added = layer.add_experts(1, expert={**SPEC, "rank": 1, "alpha": 2.0})
    spoken(layer)
    assert [layer.cohorts[key].a.shape[2] for key in layer.cohorts] == [3, 5, 1]
    assert added == [3]
    x = torch.randn(UNITS, DIM, dtype=torch.float64)
    y, routing = layer(x)
    weight = torch.zeros(UNITS, 4, dtype=torch.float64).scatter(1, routing.ids, routing.weights)
    expected, column = layer.base(x), 0
    for key, scale in (("0", ALPHA / RANK), ("1", 1.0), ("2", 2.0)):
        for a, b in zip(layer.cohorts[key].a, layer.cohorts[key].b, strict=True):
            expected = expected + weight[:, column : column + 1] * (x @ a @ b) * scale
            column += 1
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
