"""Expert dropout: experts that are left out of a training batch."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(shape: tuple[int, ...], share: float, least: int, generator: torch.Generator | None) -> Tensor:
    """Which experts stay, (..., E) bool: each is left out with probability `share`, but at least `least` of a row stay.

    Drawn on the generator's own device, or without one on the CPU: the same seed leaves out the same experts everywhere.

    Args:
        shape: of the result; E, its last dimension, is at least 1.
        share: probability of being left out.
        least: experts of a row that must stay, at least 1; all do where there are fewer.
        generator: source of random numbers; None is torch's global one.
    """
    drawn = torch.rand(shape, generator=generator, device="cpu" if generator is None else generator.device)
    # of a row with too few that would stay, those with the highest numbers do
    bar = drawn.topk(min(least, shape[-1]), dim=-1).values[..., -1:]
    return drawn >= bar.clamp(max=share)
