"""Similarities of experts against formulas written down another way, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmoe.moe import diagnostics


def outputs(experts: int = 4, tokens: int = 30, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, width, generator=generator)  # something in common
    return base + 0.8 * torch.randn(experts, tokens, width, generator=generator)


def hsic(a: np.ndarray, b: np.ndarray) -> float:
    """tr(K H L H) / (n − 1)², Gretton et al. 2005."""
    n = len(a)
    H = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(a @ a.T @ H @ b @ b.T @ H)) / (n - 1) ** 2


@pytest.mark.parametrize("width", [2, 6, 50])  # fewer and more dimensions than tokens
def test_cka_is_the_formula_of_hsic(width: int) -> None:
    y = outputs(width=width)
    found = diagnostics.linear_cka(y)
    z = y.double().numpy()
    for a in range(len(z)):
        for b in range(len(z)):
            expected = hsic(z[a], z[b]) / np.sqrt(hsic(z[a], z[a]) * hsic(z[b], z[b]))
            assert found[a, b].item() == pytest.approx(expected, abs=1e-10)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    y = outputs().double()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    moved = y.clone()
    moved[1] = 3.0 * y[1] @ rotation + 5.0
    torch.testing.assert_close(diagnostics.linear_cka(moved), diagnostics.linear_cka(y))
    moved[2] = moved[1]
    assert diagnostics.linear_cka(moved)[1, 2].item() == pytest.approx(1.0)


def test_cosine_is_the_mean_over_tokens() -> None:
    y = outputs()
    y[2, 5:] = 0.0  # an expert that is silent on most tokens: those say nothing
    found = diagnostics.pairwise_cosine(y)
    z = y.double().numpy()
    for a in range(len(z)):
        for b in range(len(z)):
            each = [
                float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
                for u, v in zip(z[a], z[b], strict=True)
                if u.any() and v.any()
            ]
            assert found[a, b].item() == pytest.approx(np.mean(each), abs=1e-12)
    assert diagnostics.pairwise_cosine(torch.stack([y[0], -2 * y[0]]))[0, 1].item() == pytest.approx(-1.0)


def test_what_has_no_value_is_nan_and_left_out_of_the_mean() -> None:
    y = outputs(3)
    y[1] = 0.0
    y[2] = torch.arange(6.0)  # the same for every token, with rounding from the mean
    cosine, cka = diagnostics.pairwise_cosine(y), diagnostics.linear_cka(y)
    assert cosine[1].isnan().all()
    assert cosine[0, 2].isfinite()
    assert cka[1].isnan().all()
    assert cka[2].isnan().all()
    assert diagnostics.mean_of_pairs(cosine) == pytest.approx(cosine[0, 2].item())
    assert diagnostics.mean_of_pairs(cka) is None


def test_disagreement_counts_different_choices() -> None:
    choices = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0], [5, 5, 5, 5]])
    found = diagnostics.disagreement(choices)
    torch.testing.assert_close(found, torch.tensor([[0, 0.25, 1], [0.25, 0, 1], [1, 1, 0]], dtype=torch.float64))
    assert diagnostics.mean_of_pairs(found) == pytest.approx(0.75)
    assert diagnostics.disagreement(torch.zeros(2, 0)).isnan().all()


@pytest.mark.parametrize("function", [diagnostics.linear_cka, diagnostics.pairwise_cosine])
def test_matrices_are_symmetric_bounded_and_move_with_the_experts(function) -> None:
    y, order = outputs(5), torch.tensor([3, 0, 4, 1, 2])
    found = function(y)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(5, dtype=torch.float64))
    assert (found.abs() <= 1).all()
    torch.testing.assert_close(function(y[order]), found[order][:, order])
    assert function(y[:1]).shape == (1, 1)
    assert diagnostics.mean_of_pairs(function(y[:1])) is None
