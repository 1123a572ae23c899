"""The auxiliary losses against numbers worked out by hand and formulas written anew."""

from __future__ import annotations

import math

import pytest
import torch

from cmoe.moe import losses


def test_cv_squared():
    # mean 2, deviations -1, 0, 1: variance 2/3, over 4
    assert float(losses.cv_squared(torch.tensor([1.0, 2.0, 3.0]))) == pytest.approx(1 / 6)
    assert float(losses.cv_squared(torch.tensor([5.0]))) == 0
    assert float(losses.cv_squared(torch.zeros(4))) == 0


def test_importance():
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    columns = torch.tensor([[0, 2], [2, 0], [1, 2]])
    assert losses.importance(weights, columns, 4).tolist() == [0.75, 0.5, 1.75, 0.0]
    loss = losses.importance_loss(weights, columns, 4)
    assert float(loss.detach()) == pytest.approx((0.0 + 0.25**2 + 1.0 + 0.75**2) / 4 / 0.75**2)
    loss.backward()
    assert weights.grad.abs().sum() > 0


def test_switch():
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    columns = torch.tensor([[0], [0], [1]])
    expected = 2 * (2 / 3 * 0.5 + 1 / 3 * 0.5)
    assert float(losses.switch_loss(probs, columns)) == pytest.approx(expected)
    valid = torch.tensor([True, False, True])
    assert float(losses.switch_loss(probs, columns, valid)) == pytest.approx(2 * (0.5 * 0.4 + 0.5 * 0.6))
    balanced = losses.switch_loss(torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4)
    assert float(balanced) == pytest.approx(1.0)


def test_z_and_entropy():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert float(losses.z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(losses.entropy_loss(logits)) == pytest.approx((math.log(2) + quarter) / 2)
    valid = torch.tensor([False, True])
    assert float(losses.entropy_loss(logits, valid)) == pytest.approx(quarter)
    assert float(losses.z_loss(logits, valid)) == pytest.approx(math.log(4) ** 2)


def test_smooth_load_is_the_chance_of_being_chosen_when_the_noise_of_one_expert_is_drawn_again():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.2
    noisy = clean + torch.randn(3, 4, generator=generator, dtype=torch.float64) * scale
    chances = torch.zeros(4, dtype=torch.float64)
    draws = 200_000
    for t in range(3):
        for e in range(4):
            again = clean[t, e] + scale[t, e] * torch.randn(draws, generator=generator, dtype=torch.float64)
            bar = sorted((float(noisy[t, i]) for i in range(4) if i != e), reverse=True)[1]  # k = 2
            chances[e] += (again > bar).double().mean()
    torch.testing.assert_close(losses.smooth_load(clean, noisy, scale, 2), chances, rtol=0, atol=0.01)
    assert float(losses.load_loss(clean, noisy, scale, 4)) == 0


def test_empty_batches_and_padding_give_zero_not_nan():
    empty, no_columns = torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int64)
    assert float(losses.switch_loss(empty, no_columns)) == 0
    assert float(losses.z_loss(empty)) == 0
    assert float(losses.entropy_loss(empty)) == 0
    assert float(losses.importance_loss(torch.zeros(0, 2), no_columns, 3)) == 0
    logits = torch.full((2, 3), float("inf"))
    nobody = torch.zeros(2, dtype=torch.bool)
    assert float(losses.z_loss(logits, nobody)) == 0
    assert float(losses.switch_loss(torch.rand(2, 3), torch.zeros(2, 1, dtype=torch.int64), nobody)) == 0
