"""Gaussians of classes in a space of features."""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk(covariance_DD: Tensor, share: float) -> Tensor:
    """(1 − share) Σ + share · s I, with s the mean variance of the dimensions: never singular for a share above 0."""
    scale = covariance_DD.diagonal().mean().clamp(min=1e-12)
    out = (1 - share) * covariance_DD
    out.diagonal().add_(share * scale)
    return out


def fitted(x_ND: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and shrunk covariance (D, D) of samples, those of the highest likelihood but for the shrinkage."""
    mean_D = x_ND.mean(0)
    around_ND = x_ND - mean_D
    return mean_D, shrunk(around_ND.T @ around_ND / len(x_ND), share)


def log_density(x_BD: Tensor, mean_D: Tensor, factor_DD: Tensor) -> Tensor:
    """log N(x; m, L Lᵀ) but for −½ D log 2π, which all Gaussians of a space share, (B,).

    Args:
        factor_DD: L, the lower Cholesky factor of the covariance.
    """
    white_DB = torch.linalg.solve_triangular(factor_DD, (x_BD - mean_D).T, upper=False)
    return -0.5 * white_DB.square().sum(0) - factor_DD.diagonal().log().sum()


def divergence(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """KL(a ‖ b) + KL(b ‖ a) in nats of two Gaussians, each a mean and a covariance: how little they overlap."""
    (m, s), (n, t) = first, second
    inverse_s, inverse_t = torch.linalg.inv(s), torch.linalg.inv(t)
    traces = (inverse_t * s.T).sum() + (inverse_s * t.T).sum() - 2 * len(m)
    apart = m - n
    return float(0.5 * (traces + apart @ (inverse_s + inverse_t) @ apart))
