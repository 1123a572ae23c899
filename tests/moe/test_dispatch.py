"""Sorting, padding and the choice of path."""

from __future__ import annotations

import pytest
import torch

from cmoe.moe import MoELayer, RouteContext, Router, Routing
from cmoe.moe.dispatch import choose
from cmoe.moe.experts import FFN


class Fixed(Router):
    """Fixed: the routing it was given."""

    routing: Routing

    def forward(self, x_TD, context, experts):
        return self.routing


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [4, 4, 4, 4], [0, 0, 0, 1], [9, 0, 0, 8], [0, 0, 0, 0]])
def test_paths_agree_with_each_expert_on_its_own_rows(counts):
    cohort = FFN(4, 8, 12, 16)
    cohort.reset_parameters()
    x = torch.randn(sum(counts), 8, requires_grad=True)
    expected = torch.cat([cohort.single(rows, e) for e, rows in enumerate(x.split(counts))])
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * direction).sum(), [x, *cohort.parameters()])
    for path in ("auto", "grouped", "loop", "bmm"):
        y = cohort(x, counts, path)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        mine = torch.autograd.grad((y * direction).sum(), [x, *cohort.parameters()])
        for a, b in zip(mine, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["auto", "grouped", "loop", "bmm"])
def test_tokens_without_any_expert_give_zero(path):
    layer = MoELayer(8, 16, experts=2, router=Fixed, dispatch=path)
    layer.add_experts(2)
    ids = torch.tensor([[-1, -1], [3, -1], [-1, 0], [2, 1]])
    weights = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, 2.0], [0.5, 0.25]])
    layer.router.routing = Routing(ids=ids, weights=weights)
    x = torch.randn(4, 8)
    y, _ = layer(x)

    def expert(e, row):
        key, position = layer.view.where[e]
        return layer.cohorts[key].single(x[row : row + 1], position)[0]

    assert torch.equal(y[0], torch.zeros(8))
    torch.testing.assert_close(y[1], 0.3 * expert(3, 1))
    torch.testing.assert_close(y[2], 2.0 * expert(0, 2))
    torch.testing.assert_close(y[3], 0.5 * expert(2, 3) + 0.25 * expert(1, 3))
    layer.router.routing = Routing(ids=torch.full((4, 1), -1), weights=torch.zeros(4, 1))
    assert torch.equal(layer(x)[0], torch.zeros(4, 8))


def test_the_choice_depends_on_the_cohort_alone():
    cohort, odd = FFN(8, 16, 32, 16), FFN(8, 7, 9, 7)
    few, many, even = [4, 2] * 4, [300, 299, 500] + [200] * 5, [4] * 8
    rows = {"few": torch.zeros(24, 16), "many": torch.zeros(2099, 16), "even": torch.zeros(32, 16)}
    assert choose(cohort, few, rows["few"], "auto") == "grouped"
    assert choose(cohort, many, rows["many"], "auto") == "grouped"
    assert choose(cohort, even, rows["even"], "auto") == "bmm"
    assert choose(cohort, few, rows["few"].double(), "auto") == "loop"
    assert choose(odd, few, rows["few"], "auto") == "loop"
    assert choose(cohort, None, rows["few"], "auto") == "grouped"
    for path in ("loop", "bmm", "grouped"):
        assert choose(cohort, few, rows["few"], path) == path


def test_a_callable_makes_experts_and_routers():
    layer = MoELayer(8, 16, expert=lambda **sizes: FFN(**sizes, activation="relu"), router=Fixed, experts=3)
    assert layer.cohorts["0"].activation == "relu"
    assert layer.add_experts(2) == [3, 4]


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 3, 4, 8), (0, 3, 8)])
def test_any_leading_dimensions(shape):
    layer = MoELayer(8, 16, 12)
    y, routing = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 12)
    assert routing.ids.shape == (int(torch.tensor(shape[:-1]).prod()), 2)
    table = MoELayer(8, 16, 12, router="task_table")
    assert table(torch.randn(shape), RouteContext(task=1))[0].shape == y.shape


@pytest.mark.parametrize("router", ["topk", "dselect_k", "per_task", "task_table"])
def test_a_layer_that_was_evaluated_first_can_train(router):
    """Index tensors are made when they are first asked for, which may be within inference mode."""
    options = {"name": "topk", "restrict": "task"} if router == "topk" else router
    layer = MoELayer(8, hidden=8, experts=3, router=options)
    layer.assign([0, 2], 0)
    x, context = torch.randn(6, 8), RouteContext(task=0)
    with torch.inference_mode():
        layer.eval()(x, context)
    y, routing = layer.train()(x, context)
    (y.sum() + sum(routing.aux.values())).backward()
    assert any(p.grad is not None for p in layer.cohorts.parameters())
