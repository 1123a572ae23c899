"""Gradient episodic memory."""

from __future__ import annotations

from typing import ClassVar

import quadprog  # ty: ignore[import-not-found] - an extension module without stubs
import torch
from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.strategies.base import Phase, Segment
from cmoe.strategies.flat import flat, product, put
from cmoe.strategies.memories import Memories

RIDGE = 1e-3  # keeps the quadratic form definite where gradients are parallel


class GEM(Memories):
    """Gradient episodic memory: no step raises the loss on an earlier experience's memory (Lopez-Paz & Ranzato 2017).

    https://arxiv.org/abs/1706.08840, to first order.
    With the batch's gradient g and the gradients G (one row for each earlier experience, over its whole memory), where
    an element of G g is negative g becomes g + Gᵀv, with v the minimum of ½ vᵀ(G Gᵀ + 10⁻³ I)v + (G g)ᵀv subject to
    v ≥ margin. Each experience leaves size / experiences samples.

    Options:
        size: samples of all experiences together.
        margin: least weight of each old gradient in a changed step (γ of the paper); above 0 favours old experiences.
    """

    called: ClassVar[str] = "gem"
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 500, margin: NonNegative = 0.5) -> None:
        super().__init__(size)
        self.margin = margin
        self._memories: list[Tensor] = []

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        super().before_phase(segment, phase)
        known = sorted(set(self.held["experience"].tolist())) if self.held else []
        self._memories = [self.rows(e) for e in known]

    def edit_gradients(self) -> None:
        if not self._memories:
            return
        old = torch.stack([self.reference(self.recalled(rows)) for rows in self._memories])
        present = flat([p.grad for p in self._parameters], self._parameters)
        products = product(old, present)
        if (products < 0).any() and products.isfinite().all():  # a loss that is no number is reported by the step
            weights = mixture(product(old, old.T), products, self.margin)
            put(present + product(weights.to(present), old), self._parameters)


def mixture(form: Tensor, products: Tensor, margin: float) -> Tensor:
    """The weights v (t,) in float64 that solve GEM's quadratic programme.

    Args:
        form: G Gᵀ, (t, t).
        products: G g, (t,).
        margin: lower bound of each weight.
    """
    form, products = form.detach().double().cpu(), products.detach().double().cpu()
    t = len(products)
    eye = torch.eye(t, dtype=torch.float64)
    definite = (form + form.T) / 2 + RIDGE * eye
    bound = torch.full((t,), float(margin), dtype=torch.float64)
    solution = quadprog.solve_qp(definite.numpy(), -products.numpy(), eye.numpy(), bound.numpy())[0]
    return torch.from_numpy(solution)
