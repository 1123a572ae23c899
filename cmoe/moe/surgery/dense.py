"""What a layer of experts becomes when it is collapsed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cmoe.moe.experts import Expert


class Dense(nn.Module):
    """One expert that works on everything, beside what worked on everything before: tensors in, tensors out.

    Attributes:
        described: how to build it again, plain; see `cmoe.moe.surgery.place`.

    Args:
        expert: a cohort of one.
        inner: dimensions of a unit before D, as the layer had.
        shared: the layer's shared experts.
        base: the network that the experts added to.
        channels_first: inputs are maps (N, C, H, W).
        after: dropout of the output.
        described: see above.
    """

    def __init__(
        self,
        expert: Expert,
        described: dict[str, Any],
        *,
        inner: int = 0,
        shared: Expert | None = None,
        base: nn.Module | None = None,
        channels_first: bool = False,
        after: float = 0.0,
    ) -> None:
        super().__init__()
        self.expert, self.shared, self.base = expert, shared, base
        self.inner, self.channels_first, self.described = inner, channels_first, described
        self.after = nn.Dropout(after) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), or (N, C, H, W) with `channels_first`, to (..., O) or (N, O, H, W)."""
        x = x.movedim(1, -1) if self.channels_first else x
        units = x.flatten(0, x.dim() - 2 - self.inner)
        y = self.expert.single(units, 0)
        if self.shared is not None:
            y = y + (self.shared.single(units, 0) if self.shared.n == 1 else self.shared.every(units).sum(0))
        if self.base is not None:
            y = y + self.base(units)
        y = self.after(y.reshape(*x.shape[:-1], y.shape[-1]))
        return y.movedim(-1, 1) if self.channels_first else y
