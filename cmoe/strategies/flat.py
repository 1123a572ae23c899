"""Gradients of all parameters as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients one behind the other, (P,), in the parameters' order; zeros where one is None.

    Half precision becomes single, since inner products over all parameters are taken of it.
    """
    pairs = zip(gradients, parameters, strict=True)
    vector = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """d loss / d parameters as a vector (P,); the parameters' own `grad` stays as it is."""
    return flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


def put(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Make a vector (P,) the gradients of the parameters."""
    for p, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p).to(p.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, or inner product, in the operands' own precision also within mixed precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
