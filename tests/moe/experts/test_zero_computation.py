"""The experts of MoE++ (Jin et al. 2024): zero, copy, constant."""

from __future__ import annotations

import pytest
import torch

from cmoe.moe import MoELayer, Routing, diagnostics

from .kinds import DIM, HIDDEN, UNITS, Fixed, spoken

MORE = [{"experts": 1, "expert": "zero"}, {"experts": 1, "expert": "copy"}, {"experts": 2, "expert": "constant"}]


def plus(**options):
    """Two feed-forward experts (0, 1), zero (2), copy (3), constants (4, 5)."""
    return spoken(MoELayer(DIM, HIDDEN, experts=2, router=Fixed, more=MORE, **options)).double()


def given(layer, ids, weights):
    layer.router.routing = Routing(torch.tensor(ids), torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("path", ["auto", "loop", "bmm", "dense"])
def test_formulas_of_the_paper(path):
    layer = plus(dispatch=path)
    x = torch.randn(5, DIM, dtype=torch.float64)
    given(
        layer, [[2, 0], [3, 1], [4, 5], [5, 2], [3, 2]], [[0.6, 0.4], [0.7, 0.3], [0.5, 0.25], [0.9, 0.1], [0.2, 0.8]]
    )
    y, _ = layer(x)

    def ffn(e, row):
        return layer.cohorts["0"].single(x[row : row + 1], e)[0]

    def constant(e, row):
        """α₁ x + α₂ v with [α₁, α₂] = softmax(W x)."""
        cohort = layer.cohorts["3"]
        a = (x[row] @ cohort.w[e]).exp()
        return (a[0] * x[row] + a[1] * cohort.v[e, 0]) / a.sum()

    torch.testing.assert_close(y[0], 0.4 * ffn(0, 0))  # zero: what is left is less
    torch.testing.assert_close(y[1], 0.7 * x[1] + 0.3 * ffn(1, 1))
    torch.testing.assert_close(y[2], 0.5 * constant(0, 2) + 0.25 * constant(1, 2))
    torch.testing.assert_close(y[3], 0.9 * constant(1, 3))
    torch.testing.assert_close(y[4], 0.2 * x[4])


def test_a_constant_between_its_two_ends():
    layer = MoELayer(DIM, experts=1, expert="constant", router="dense").double()
    cohort = layer.cohorts["0"]
    assert float(cohort.v.detach().std()) == pytest.approx(1.0, abs=0.6)
    x = torch.rand(UNITS, DIM, dtype=torch.float64) + 0.1
    with torch.no_grad():
        for sign, expected in ((1.0, x), (-1.0, cohort.v[0].expand_as(x))):
            cohort.w[0, :, 0], cohort.w[0, :, 1] = sign * 1e3, -sign * 1e3
            torch.testing.assert_close(layer(x)[0], expected)


def test_tokens_that_choose_them_cost_less():
    layer = plus()
    x = torch.randn(4, DIM, dtype=torch.float64)
    one = 2 * 2 * DIM * HIDDEN
    beside = layer.flops_for_all()
    measured = []
    for ids in ([[0, 1]] * 4, [[0, 2]] * 4, [[3, 2]] * 4, [[4, 2]] * 4):
        given(layer, ids, [[0.5, 0.5]] * 4)
        flow = diagnostics.Flow.of(layer(x)[1])
        measured.append(diagnostics.active_flops(layer, flow.load, flow.tokens) - beside)
    assert measured == [2 * one, one, 0, 6 * DIM]
    assert layer.flops_per_token() == beside + 2 * one
    total, active = layer.parameter_counts()
    ffn = 2 * DIM * HIDDEN + HIDDEN + DIM
    assert (total, active) == (2 * ffn + 2 * 3 * DIM, 2 * ffn)


def test_the_router_learns_to_let_tokens_pass():
    """A task that half of the tokens need nothing for: those go to the copy expert by themselves."""
    torch.manual_seed(1)
    layer = MoELayer(
        DIM, HIDDEN, experts=1, router={"name": "topk", "k": 1, "order": "after"}, more=[{"expert": "copy"}]
    )
    optim = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        x = torch.randn(64, DIM)
        easy = x[:, :1] > 0
        y, _ = layer(x)
        loss = (y - torch.where(easy, x, -3 * x)).square().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    ids = layer(x)[1].ids[:, 0]
    assert float((ids[easy[:, 0]] == 1).float().mean()) > 0.8
    assert float((ids[~easy[:, 0]] == 0).float().mean()) > 0.8
