"""How alike experts are on the same tokens; matrices (E, E), symmetric, float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_cosine(outputs_ETO: Tensor) -> Tensor:
    """Mean over tokens of the cosine between two experts' outputs; nan without a token at which both are not 0.

    Experts that agree up to a positive factor at each token have 1.
    """
    unit_ETO = F.normalize(outputs_ETO.double(), dim=2, eps=1e-300)
    there_ET = (outputs_ETO != 0).any(2).double()
    unit = unit_ETO.flatten(1)
    return (unit @ unit.T / (there_ET @ there_ET.T)).clamp(-1.0, 1.0)


def linear_cka(outputs_ETO: Tensor) -> Tensor:
    """Linear centred kernel alignment of two experts' outputs (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414).

    HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = Y Yᵀ over the tokens, centred: 1 for outputs that are equal up to a
    rotation, a scale and a shift. nan for an expert whose output is constant. Few tokens in many dimensions bias it
    upwards: compare only what was measured on as many. Memory E · T².
    """
    centred_ETO = outputs_ETO.double() - outputs_ETO.double().mean(1, keepdim=True)
    gram = (centred_ETO @ centred_ETO.mT).flatten(1)
    hsic_EE = gram @ gram.T
    own_E = hsic_EE.diagonal().sqrt()
    # what is left of a constant output is rounding: relative to the size of the output
    size_E = outputs_ETO.double().square().sum((1, 2))
    own_E = torch.where(own_E > 1e-12 * size_E, own_E, float("nan"))
    return (hsic_EE / (own_E.unsqueeze(0) * own_E.unsqueeze(1))).clamp(0.0, 1.0)


def disagreement(choices_EN: Tensor) -> Tensor:
    """Share of samples for which two experts, each alone, choose different outputs; 0 … 1, nan without samples."""
    experts, samples = choices_EN.shape
    differ = [(choices_EN != choices_EN[e]).double().sum(1) for e in range(experts)]
    return torch.stack(differ) / samples if experts else torch.zeros(0, 0, dtype=torch.float64)


def mean_of_pairs(matrix_EE: Tensor) -> float | None:
    """Mean over different experts, of the pairs that have a value; None where no pair has."""
    above = matrix_EE[torch.ones_like(matrix_EE, dtype=torch.bool).triu(1)]
    known = above[~above.isnan()]
    return float(known.mean()) if len(known) else None
