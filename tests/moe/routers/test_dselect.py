"""DSelect-k against its formulas, written out a second time in numpy and float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cmoe.moe import MoELayer, RouteContext
from cmoe.moe.routers.dselect import deciding_digits, smooth_step

DIM, TOKENS = 6, 50


def make(experts: int, **options: Any) -> MoELayer:
    torch.manual_seed(1)
    layer = MoELayer(DIM, 4, experts=experts, router={"name": "dselect_k", **options}).double().eval()
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dense(layer: MoELayer, x: torch.Tensor, **context: Any) -> torch.Tensor:
    routing = layer.router(x, RouteContext(**context), layer.view)
    out = torch.zeros(len(x), max(layer.ids) + 2, dtype=torch.float64)
    return out.scatter_add(1, routing.ids + 1, routing.weights)[:, 1:]


def step(z: np.ndarray, gamma: float) -> np.ndarray:
    inner = -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 0.5
    return np.where(z <= -gamma / 2, 0.0, np.where(z >= gamma / 2, 1.0, inner))


def gates(layer: MoELayer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits' scores (T, k, bits), lowest digit first, and selectors' shares (T, k) of a token gate."""
    score = layer.router.score
    digits, shares = (p.detach().numpy() for p in (score.digits, score.shares))
    z = np.einsum("td,kmd->tkm", x, digits) + score.digit_bias.detach().numpy()
    a = x @ shares.T + score.share_bias.detach().numpy()
    e = np.exp(a - a.max(1, keepdims=True))
    return z, e / e.sum(1, keepdims=True)


def selectors(z: np.ndarray, experts: int, digits: int, gamma: float) -> np.ndarray:
    """(T, k, E): the paper's product over the digits of an expert's number, for E a power of 2."""
    s = step(z, gamma)
    out = np.ones((*z.shape[:2], experts))
    for e, m in itertools.product(range(experts), range(digits)):
        out[:, :, e] *= s[:, :, m] if e >> m & 1 else 1 - s[:, :, m]
    return out


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_smooth_step_and_its_slope(gamma: float) -> None:
    z = torch.linspace(-2, 2, 401, dtype=torch.float64).requires_grad_()
    s = smooth_step(z, gamma)
    np.testing.assert_allclose(s.detach(), step(z.detach().numpy(), gamma), atol=1e-12)
    s.sum().backward()
    inside = z.detach().abs() < gamma / 2
    slope = torch.where(inside, -6 / gamma**3 * z.detach() ** 2 + 3 / (2 * gamma), 0.0)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, slope, atol=1e-12, rtol=0)
    assert (s[z <= -gamma / 2] == 0).all()
    assert (s[z >= gamma / 2] == 1).all()


@pytest.mark.parametrize("digits", [0, 1, 2, 3])
@pytest.mark.parametrize("gamma", [0.4, 1.0, 5.0])
def test_weights_are_the_papers(digits: int, gamma: float) -> None:
    layer, x = make(2**digits, k=3, gamma=gamma), inputs()
    z, share = gates(layer, x.numpy())
    r = selectors(z, 2**digits, digits, gamma)
    np.testing.assert_allclose(r.sum(2), 1.0)
    expected = np.einsum("tk,tke->te", share, r)
    np.testing.assert_allclose(dense(layer, x).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("gate", ["static", "task"])
def test_a_static_gate_is_the_same_for_all_tokens(gate: str) -> None:
    layer, x = make(4, k=2, gate=gate), inputs()
    task = torch.arange(TOKENS) % 3
    score = layer.router.score
    digits, shares = (p.detach().numpy() for p in (score.digits, score.shares))
    labels = task.numpy() if gate == "task" else np.zeros(TOKENS, dtype=int)
    z = digits[:, :, labels].transpose(2, 0, 1)
    a = np.exp(shares[:, labels].T)
    expected = np.einsum("tk,tke->te", a / a.sum(1, keepdims=True), selectors(z, 4, 2, 1.0))
    np.testing.assert_allclose(dense(layer, x, task=task).detach(), expected, atol=1e-12)
    assert len(np.unique(expected.round(12), axis=0)) == (3 if gate == "task" else 1)


@pytest.mark.parametrize("ids", [(0, 1, 2), (0, 3, 4), (1, 6, 7, 12), (5,), (0, 2, 4, 6), tuple(range(1, 12))])
def test_any_ids_share_the_whole_weight(ids: tuple[int, ...]) -> None:
    """Also after removals, where ids leave codes without an expert: each selector walks down the digits and turns only
    where both ways lead to somebody."""
    layer, x = make(max(ids) + 1, k=2), inputs()
    layer.remove(set(layer.ids) - set(ids))
    z, share = gates(layer, x.numpy())
    s = step(z, 1.0)
    expected = np.zeros((TOKENS, max(ids) + 1))
    for t, k in itertools.product(range(TOKENS), range(2)):

        def walk(digit: int, left: list[int], weight: float, t: int = t, k: int = k) -> None:
            if digit < 0:
                expected[t, left[0]] += weight
                return
            up, down = [e for e in left if e >> digit & 1], [e for e in left if not e >> digit & 1]
            if not up or not down:
                walk(digit - 1, left, weight)
            else:
                walk(digit - 1, up, weight * s[t, k, digit])
                walk(digit - 1, down, weight * (1 - s[t, k, digit]))

        walk(15, list(ids), share[t, k])
    found = dense(layer, x).detach()
    np.testing.assert_allclose(found[:, : max(ids) + 1], expected, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(TOKENS, dtype=torch.float64))


def test_digits_that_decide_nothing_are_left_out() -> None:
    assert deciding_digits((0, 1, 2, 3), 16) == [1, 0]
    assert deciding_digits((8, 9), 16) == [0]
    assert deciding_digits((0, 2, 8), 16) == [3, 1]
    assert deciding_digits((7,), 16) == []


def test_decided_selectors_leave_at_most_k_experts() -> None:
    layer, x = make(8, k=2, gamma=1e-6), inputs()
    routing = layer.router(x, RouteContext(), layer.view)
    assert routing.ids.shape[1] == 2
    assert (routing.weights[routing.ids < 0] == 0).all()
    assert ((routing.ids >= 0).sum(1) <= 2).all()
    wide = make(8, k=2, gamma=100.0)
    assert (wide.router(x, RouteContext(), wide.view).ids >= 0).all()
    assert wide.router(x, RouteContext(), wide.view).ids.shape[1] == 8


@pytest.mark.parametrize("valid", [None, torch.arange(TOKENS) % 3 != 0])
def test_the_entropy_is_that_of_each_selector(valid: torch.Tensor | None) -> None:
    layer, x = make(8, k=3, entropy=0.5).train(), inputs()
    aux = layer.router(x, RouteContext(valid=valid), layer.view).aux
    r = selectors(gates(layer, x.numpy())[0], 8, 3, 1.0)
    entropy = -(r * np.log(np.maximum(r, 1e-300))).sum((1, 2))
    mean = entropy.mean() if valid is None else entropy[valid.numpy()].mean()
    assert list(aux) == ["entropy"]
    assert aux["entropy"].item() == pytest.approx(0.5 * mean, abs=1e-9)


def test_the_entropy_makes_selectors_decide() -> None:
    """Every expert works at first; trained with the loss, one for each selector is left, and gradients stay finite."""
    layer = MoELayer(DIM, 4, experts=5, router={"name": "dselect_k", "k": 2, "gate": "static", "entropy": 1.0}).double()
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    x = inputs()
    assert layer.router(x, RouteContext(), layer.view).ids.shape[1] == 5
    for _ in range(100):
        optimizer.zero_grad()
        loss = layer.router(x, RouteContext(), layer.view).aux["entropy"]
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.router.parameters())
    assert layer.router(x, RouteContext(), layer.view).ids.shape[1] <= 2
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_an_id_with_more_digits_is_refused() -> None:
    layer = make(5, bits=2)
    with pytest.raises(ValueError, match="bits: expected at least 3 for expert 4, got 2"):
        dense(layer, inputs())
    with pytest.raises(ValueError, match="dselect_k: gate"):
        make(2, gate="nothing")
