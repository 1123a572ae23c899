"""Sorting, padding and the choice of path."""

from __future__ import annotations

import pytest
import torch

from cmoe.moe import MoELayer, RouteContext, Router, Routing
from cmoe.moe.dispatch import choose, run_bmm, run_grouped, run_loop
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
    runners = (run_loop, run_grouped, run_bmm) if sum(counts) else (run_loop,)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * direction).sum(), [x, *cohort.parameters()])
    for run in runners:
        y = run(cohort, x, counts)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        mine = torch.autograd.grad((y * direction).sum(), [x, *cohort.parameters()])
        for a, b in zip(mine, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for path in ("auto", "grouped", "loop", "bmm"):
        torch.testing.assert_close(cohort(x, counts, path), expected, rtol=1e-5, atol=1e-6)


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
    x = torch.randn(0, 16)
    few, many, skewed = [4] * 8, [300] * 8, [1] * 7 + [400]
    at = {name: torch.zeros(sum(counts), 16) for name, counts in (("few", few), ("many", many), ("skewed", skewed))}
    assert choose(cohort, few, at["few"], "auto") == "grouped"
    assert choose(cohort, many, at["many"], "auto") == "loop"
    assert choose(cohort, few, at["few"].bfloat16(), "auto") == "bmm"
    assert choose(cohort, few, at["few"].double(), "auto") == "bmm"
    assert choose(cohort, skewed, at["skewed"].double(), "auto") == "loop"
    assert choose(odd, few, at["few"], "auto") == "bmm"
    for path in ("loop", "bmm", "grouped"):
        assert choose(cohort, few, x, path) == path


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
