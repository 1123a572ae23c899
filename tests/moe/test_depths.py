"""Mixture-of-Depths against its formula; what may look ahead, and what a decoder decides without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe import MixtureOfDepths
from cmoe.moe.depths import places

BATCH, LENGTH, DIM = 3, 16, 6


class Branch(nn.Module):
    """Causal attention and a nonlinearity, so that the order and the company of tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(DIM, DIM)
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.detach())
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, -torch.inf)
        return torch.tanh(self.mix(scores.softmax(2) @ x))


class Whole(nn.Module):
    """The same as a block that adds its input."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def make(dtype: torch.dtype = torch.float64, **options: Any) -> MixtureOfDepths:
    torch.manual_seed(1)
    return MixtureOfDepths(Branch(), DIM, **options).to(dtype)


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(mod: MixtureOfDepths, x: Tensor, valid: Tensor | None = None) -> np.ndarray:
    """x + r · f of the best tokens of each sequence, one sequence after the other, in numpy."""
    out = x.detach().numpy().copy()
    w = mod.router.weight.detach().numpy()[0]
    mix, bias = mod.module.mix.weight.detach().numpy(), mod.module.mix.bias.detach().numpy()
    for b in range(len(x)):
        real = [i for i in range(LENGTH) if valid is None or valid[b, i]]
        scores = {i: float(out[b, i] @ w) for i in real}
        count = math.ceil(round(mod.capacity * len(real), 9))
        best = sorted(sorted(real, key=lambda i, s=scores: -s[i])[:count])
        tokens = x.detach().numpy()[b, best]
        for m, i in enumerate(best):
            s = tokens[: m + 1] @ tokens[m]
            a = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            out[b, i] += scores[i] * np.tanh(mix @ (a @ tokens[: m + 1]) + bias)
    return out


@pytest.mark.parametrize("capacity", [0.05, 0.125, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_the_best_tokens_go_through_and_the_others_pass_by(capacity: float, padded: bool) -> None:
    mod, x = make(capacity=capacity), inputs()
    valid = torch.arange(LENGTH) < torch.tensor([16, 7, 0]).unsqueeze(1) if padded else None
    y, depths = mod(x, valid)
    np.testing.assert_allclose(y.detach(), formula(mod, x, valid), atol=1e-12)
    lengths = [16, 7, 0] if padded else [LENGTH] * BATCH
    assert depths.chosen.sum(1).tolist() == [places(capacity, n) for n in lengths]
    assert torch.equal(y[~depths.chosen], x[~depths.chosen])
    assert depths.aux == {}


def test_only_the_chosen_cost_anything() -> None:
    mod = make(capacity=0.25)
    mod(inputs())
    assert [call.shape for call in mod.module.calls] == [(BATCH, 4, DIM)]


@pytest.mark.parametrize("capacity", [0.1, 1.0])
def test_a_module_that_adds_its_input_adds_it_once(capacity: float) -> None:
    mod = make(capacity=capacity)
    whole = MixtureOfDepths(Whole(mod.module), DIM, capacity, adds=True).double()
    whole.router.load_state_dict(mod.router.state_dict())
    torch.testing.assert_close(whole(inputs())[0], mod(inputs())[0])


@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_is_that_of_the_formula(padded: bool) -> None:
    """Of tokens, the module and the router, which learns through the weights."""
    mod = make(capacity=0.3, causal=True).train()
    names = [name for name, _ in mod.named_parameters()]
    valid = torch.arange(LENGTH) < torch.tensor([16, 5, 0]).unsqueeze(1) if padded else None

    def output(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(mod, given, (x, valid))[0]

    values = [p.detach().requires_grad_() for p in mod.parameters()]
    assert torch.autograd.gradcheck(output, (inputs().requires_grad_(), *values), fast_mode=True)
    y, _ = mod(inputs(), valid)
    y.square().sum().backward()
    assert mod.router.weight.grad.abs().sum() > 0


def test_a_decoder_looks_ahead_while_training_only() -> None:
    mod, x = make(capacity=0.3, causal=True), inputs()
    changed = torch.cat([x[:, :8], 5 * inputs(seed=9)[:, 8:]], 1)
    mod.eval()
    with torch.no_grad():
        assert 0 < mod(x)[1].chosen.sum() < x.shape[0] * LENGTH
    torch.testing.assert_close(mod(x)[0][:, :8], mod(changed)[0][:, :8])
    mod.train()
    assert (mod(x)[0] - mod(changed)[0])[:, :8].abs().max() > 1e-3


def test_the_predictor_learns_who_will_be_chosen_and_shapes_nothing_else() -> None:
    mod, x = make(capacity=0.25, causal=True, predictor=0.5).train(), inputs().requires_grad_()
    _, depths = mod(x)
    logits = mod.predictor.second(F.silu(mod.predictor.first(x))).squeeze(2)
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, depths.chosen.double())
    torch.testing.assert_close(depths.aux["depth"], expected)
    depths.aux["depth"].backward()
    assert x.grad is None
    assert mod.router.weight.grad is None
    assert mod.module.mix.weight.grad is None
    optimizer = torch.optim.Adam(mod.predictor.parameters(), lr=0.02)
    data = torch.randn(64, LENGTH, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(200):
        optimizer.zero_grad()
        mod(data)[1].aux["depth"].backward()
        optimizer.step()
    fresh = torch.randn(64, LENGTH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_top_k = mod(fresh)[1].chosen
    by_predictor = mod.eval()(fresh)[1].chosen
    assert (by_top_k == by_predictor).double().mean() > 0.9
    assert by_predictor.double().mean() == pytest.approx(0.25, abs=0.05)


def test_the_predictors_loss_leaves_padding_out() -> None:
    mod = make(capacity=0.25, causal=True).train()
    valid = torch.arange(LENGTH) < torch.tensor([16, 7, 0]).unsqueeze(1)
    clean, poisoned = (inputs().masked_fill(~valid.unsqueeze(2), v) for v in (0.0, math.inf))
    a, b = mod(clean, valid)[1], mod(poisoned, valid)[1]
    torch.testing.assert_close(a.aux["depth"], b.aux["depth"])
    assert torch.equal(a.chosen, b.chosen)
    y, depths = mod(poisoned, valid)
    (y[valid].square().sum() + depths.aux["depth"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mod.parameters())


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_nobody_and_everybody(bias: float) -> None:
    mod, x = make(causal=True).eval(), inputs()
    with torch.no_grad():
        mod.predictor.second.bias.fill_(bias)
    y, depths = mod(x)
    assert depths.chosen.all() if bias > 0 else not depths.chosen.any()
    assert torch.equal(y, x) == (bias < 0)


def test_the_module_can_be_told_which_tokens_it_has() -> None:
    mod, x = make(capacity=0.5), inputs()
    valid = torch.arange(LENGTH) < torch.tensor([16, 6, 1]).unsqueeze(1)
    told = []

    def call(picked: Tensor, where: Tensor) -> Tensor:
        told.append(where)
        assert torch.equal(picked[where < 0], torch.zeros_like(picked[where < 0]))
        return mod.module(picked)

    y, depths = mod(x, valid, call)
    torch.testing.assert_close(y, mod(x, valid)[0])
    for b in range(BATCH):
        here = told[0][b][told[0][b] >= 0].tolist()
        assert here == depths.chosen[b].nonzero().flatten().tolist()
    assert told[0].shape == (BATCH, 8)


def test_permuted_tokens_of_a_module_by_token() -> None:
    mod = MixtureOfDepths(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()), DIM, 0.25).double()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mod(inputs()[:, order])[0], mod(inputs())[0][:, order])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_one_token_and_none(shape: tuple[int, int], training: bool) -> None:
    for causal in (False, True):
        mod = make(causal=causal).train(training)
        y, depths = mod(torch.zeros(*shape, DIM, dtype=torch.float64))
        assert y.shape == (*shape, DIM)
        assert all(loss.isfinite() for loss in depths.aux.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_choice_is_made_in_float32(dtype: torch.dtype) -> None:
    mod, x = make(dtype, causal=True).train(), inputs().to(dtype)
    y, depths = mod(x)
    assert y.dtype == dtype
    assert depths.scores.dtype == torch.float32
    exact = make(torch.float32).train()
    exact.load_state_dict(mod.state_dict(), strict=False)
    torch.testing.assert_close(depths.scores, exact(x.float())[1].scores)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = make(torch.float32, causal=True).train()
        y, depths = mixed(x.float())
        assert depths.scores.dtype == torch.float32
        (y.float().sum() + depths.aux["depth"]).backward()


def test_a_capacity_is_rounded_up_once() -> None:
    assert [places(c, n) for c, n in ((0.125, 16), (0.125, 17), (0.07, 100), (0.01, 1), (0.5, 0), (1.0, 9))] == [
        2,
        3,
        7,
        1,
        0,
        9,
    ]
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="capacity: expected above 0"):
            make(capacity=wrong)
