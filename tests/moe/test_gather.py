"""Fetching tiny experts' weights row by row gives what one product per expert does, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.moe import MoELayer
from cmoe.moe.dispatch import choose, dispatch
from cmoe.moe.gather import FETCHED, MANY, gathered_linear, pays
from cmoe.moe.routing import Routing

DIM, EXPERTS, TOKENS = 6, 80, 50
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "one unit": ({"name": "ffn", "bias": False}, 1),
    "one unit, biases": ({"name": "ffn"}, 1),
    "swiglu": ({"name": "ffn", "activation": "swiglu"}, 2),
    "three units": ({"name": "ffn", "activation": "relu"}, 3),
    "linear": ({"name": "linear", "activation": "tanh"}, 4),
}


def make(kind: str, dtype: torch.dtype = torch.float64) -> MoELayer:
    torch.manual_seed(0)
    expert, hidden = KINDS[kind]
    layer = MoELayer(DIM, hidden, experts=EXPERTS, expert=expert, router="topk")
    layer.add_experts(70)
    return layer.to(dtype)


def routing(dtype: torch.dtype = torch.float64) -> Routing:
    """Two experts of either cohort for most tokens, and nobody for some."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(a, a + 70, (TOKENS,), generator=generator) for a in (0, EXPERTS)], 1)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)
    weights = torch.rand(ids.shape, generator=generator, dtype=dtype).masked_fill(ids < 0, 0.0)
    return Routing(ids, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_chosen_and_agrees_with_the_loop(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=dtype)
    found: dict[str, list[Tensor | None]] = {}
    for path in ("auto", "loop"):
        layer, tokens = make(kind, dtype), x.clone().requires_grad_()
        counts = [1] * EXPERTS
        assert choose(layer.cohorts["0"], counts, x, path) == ("gather" if path == "auto" else "loop")
        y, load = dispatch(tokens, routing(dtype), layer.view, layer.cohorts, path)
        y.square().sum().backward()
        found[path] = [y, tokens.grad, *(p.grad for p in layer.cohorts.parameters()), torch.as_tensor(load)]
    for a, b in zip(found["auto"], found["loop"], strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (4, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_the_formula(inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    expert = torch.tensor([0, 2, 2, 4, 4, 4])
    x, weight, added = drawn(6, inputs), drawn(5, inputs, outputs), drawn(5, outputs) if bias else None
    y = gathered_linear(x, weight, added, expert)
    for n, e in enumerate(expert.tolist()):
        torch.testing.assert_close(y[n], x[n] @ weight[e] + (0 if added is None else added[e]))
    arguments = (x, weight) if added is None else (x, weight, added)
    assert torch.autograd.gradcheck(lambda a, w, b=None: gathered_linear(a, w, b, expert), arguments)


def test_a_row_depends_on_no_other_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((40, 9), (7, 9, 1)))
    expert = torch.arange(40) % 7
    whole = gathered_linear(x, weight, None, expert)
    assert torch.equal(whole[5:9], gathered_linear(x[5:9], weight, None, expert[5:9]))


def test_where_it_pays() -> None:
    """Many experts, few rows for each, few weights, on the CPU, in a precision that it computes well."""
    layer = make("one unit")
    cohort, one = layer.cohorts["0"], 2 * DIM
    most = FETCHED * EXPERTS // one
    for rows, expected in ((most, True), (most + EXPERTS, False)):
        assert pays(cohort, [1] * EXPERTS, torch.empty(rows, DIM), torch.float32) == expected
    assert not pays(cohort, [1] * (MANY - 1), torch.empty(1, DIM), torch.float32)
    assert not pays(cohort, [1] * EXPERTS, torch.empty(1, DIM), torch.bfloat16)
    assert not pays(cohort, [1] * EXPERTS, torch.empty(1, 3, DIM), torch.float32)
    assert not pays(cohort, [1] * EXPERTS, torch.empty(1, DIM, device="meta"), torch.float32)
