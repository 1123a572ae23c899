"""Linear maps of sorted rows: values, gradients, gradients of gradients, rows of nobody, low precision."""

from __future__ import annotations

import pytest
import torch

from cmoe.moe import spare
from cmoe.moe.grouped import Rows, grouped_linear

COUNTS = [[3, 0, 5, 1], [0, 0, 4, 0], [2, 2, 2, 2], [0, 0, 0, 0], [7, 1, 0, 16]]
CPU = torch.device("cpu")


def rows(counts, way="loop", extra=0, host=True):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return Rows(counts if host else None, None if host else ends, sum(counts) + extra, CPU, way)


def tensors(counts, dtype=torch.float64, extra=0):
    x = torch.randn(sum(counts) + extra, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), 8, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(len(counts), 16, dtype=dtype, requires_grad=True)
    return x, weight, bias


def one_by_one(x, weight, bias, counts):
    parts = x.split([*counts, len(x) - sum(counts)])
    out = [part @ weight[e] + bias[e] for e, part in enumerate(parts[:-1])]
    return torch.cat([*out, x.new_zeros(len(parts[-1]), weight.shape[2])])


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_and_their_gradients(counts):
    inputs = tensors(counts)
    where = rows(counts)
    assert torch.autograd.gradcheck(lambda *a: grouped_linear(*a, where), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: grouped_linear(*a, where), inputs)
    torch.testing.assert_close(grouped_linear(*inputs, where), one_by_one(*inputs, counts))


@pytest.mark.parametrize("host", [True, False], ids=["counts known", "counts on the device"])
@pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)])
def test_grouped_products_equal_the_loop_and_leave_nobody_alone(counts, host):
    extra = 0 if host else 3
    x, weight, bias = tensors(counts, torch.float32, extra)
    direction = torch.randn(len(x), 16)
    expected = torch.autograd.grad((one_by_one(x, weight, bias, counts) * direction).sum(), (x, weight, bias))
    y = grouped_linear(x, weight, bias, rows(counts, "grouped", extra, host))
    torch.testing.assert_close(y, one_by_one(x, weight, bias, counts), rtol=1e-5, atol=1e-5)
    if extra:
        assert torch.equal(y[-extra:], torch.zeros(extra, 16))
    for mine, theirs in zip(torch.autograd.grad((y * direction).sum(), (x, weight, bias)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = tensors([3, 2])
    frozen, fixed = weight.detach(), bias.detach()
    grouped_linear(x, frozen, fixed, rows([3, 2])).sum().backward()
    assert x.grad is not None
    grouped_linear(x.detach(), weight, fixed, rows([3, 2])).sum().backward()
    assert weight.grad is not None


def test_low_precision_is_rounded_once():
    """One rounding of the exact product, whatever the processor: errors of half a unit in the last place."""
    counts = [40, 24]
    x, weight, _ = tensors(counts, torch.bfloat16)
    y = grouped_linear(x, weight, None, rows(counts)).detach().double()
    zero = torch.zeros(2, 16, dtype=torch.float64)
    exact = one_by_one(x.detach().double(), weight.detach().double(), zero, counts)
    assert float(((y - exact).abs() / exact.abs().clamp(min=0.5)).max()) <= 2**-8 * 1.02


def test_memory_of_a_large_gradient_is_used_again_only_when_nobody_holds_it(monkeypatch):
    monkeypatch.setattr(spare, "LARGE", 0)
    weight = torch.nn.Parameter(torch.randn(2, 8, 16))
    x = torch.randn(5, 8)

    def step():
        grouped_linear(x, weight, None, rows([3, 2])).sum().backward()
        return weight.grad

    first = step()
    expected, address = first.clone(), first.data_ptr()
    held = step()  # accumulated in place; the second gradient had memory of its own
    torch.testing.assert_close(held, 2 * expected)
    weight.grad = None
    again = step()
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(held, 2 * expected)  # still what it was
    del first, held, again
    weight.grad = None
    torch.testing.assert_close(step(), expected)
    reused = weight.grad.data_ptr()
    weight.grad = None
    assert step().data_ptr() == reused
    assert address  # an address, so that the test knows that memory was allocated at all
