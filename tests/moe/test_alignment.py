"""Linear assignment and the order of hidden units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from cmoe.moe.alignment import assignment, matching, reordered
from cmoe.moe.experts import FFN


def worth(kind, n, seed):
    g = torch.Generator().manual_seed(seed)
    if kind == "integers":  # full of ties
        return torch.randint(0, 3, (n, n), generator=g).double()
    if kind == "distances":
        a, b = (torch.randn(n, max(1, n // 3), generator=g, dtype=torch.float64) for _ in range(2))
        return -torch.cdist(a, b).square()
    return torch.randn(n, n, generator=g, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["normal", "integers", "distances"]), st.integers(1, 40), st.integers(0, 10**6))
def test_the_assignment_is_as_good_as_scipys(kind, n, seed):
    w = worth(kind, n, seed)
    found = assignment(w)
    assert sorted(found.tolist()) == list(range(n))
    rows, columns = linear_sum_assignment(-w.numpy())
    best = w.numpy()[rows, columns].sum()
    assert best - w[torch.arange(n), found].sum().item() <= 1e-3 * (w.max() - w.min()).item() + 1e-9


def test_what_cannot_be_assigned_is_refused():
    with pytest.raises(ValueError, match=r"square matrix of finite numbers, got \(2, 3\)"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="finite"):
        assignment(torch.tensor([[float("nan")]]))
    assert assignment(torch.zeros(0, 0)).tolist() == []
    assert assignment(torch.full((4, 4), 2.5)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_another_order_of_the_hidden_units_is_found_exactly(activation, bias):
    torch.manual_seed(0)
    made = FFN(2, 6, 50, 5, activation=activation, bias=bias).double()
    made.reset_parameters()
    units, order = made.units(), torch.randperm(50)
    x = torch.randn(9, 6, dtype=torch.float64)
    own = {name: p.detach()[0].clone() for name, p in made.named_parameters()}
    with torch.no_grad():
        for name, p in made.named_parameters():
            p[1] = reordered(own[name], *units[name], order) if name in units else own[name]
    torch.testing.assert_close(made.single(x, 0), made.single(x, 1), rtol=1e-12, atol=1e-12)  # the same function
    found = matching(own, {name: p.detach()[1] for name, p in made.named_parameters()}, units)
    assert torch.equal(order[found], torch.arange(50))
    for name, p in made.named_parameters():
        again = reordered(p.detach()[1], *units[name], found) if name in units else p.detach()[1]
        assert torch.equal(again, own[name])
