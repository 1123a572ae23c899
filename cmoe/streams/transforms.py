"""Batched transforms from raw storage to model input.

A batch may mix experiences: each sample gets its own experience's transform, and what a sample becomes does not
depend on its company, bit for bit. Chance comes from the generator handed in and acts only in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class BatchTransform(Protocol):
    """How a raw batch becomes model input.

    A transform that draws random numbers says so by the attribute `stochastic = True`.
    """

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        """Transform a batch.

        Args:
            x: (B, ...) raw samples.
            experience: (B,) int64, or one int where all samples are of one experience.
            train: whether augmentation acts.
            generator: where randomness comes from; None is torch's global one.

        Returns:
            (B, ...) float32, or int64 token ids.
        """
        ...


def is_stochastic(transform: BatchTransform) -> bool:
    """Whether it draws random numbers in training."""
    return bool(getattr(transform, "stochastic", False))


class Scale:
    """uint8 to float32: divide by `divisor`, then subtract `mean` and divide by `std` (one number or one a channel).

    Floats pass undivided.
    """

    def __init__(
        self, divisor: float = 255.0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        self.divisor = divisor
        self.mean = None if mean is None else torch.tensor(mean, dtype=torch.float32)
        self.std = None if std is None else torch.tensor(std, dtype=torch.float32)

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        y = x if x.is_floating_point() else x.to(torch.float32).div_(self.divisor)
        if self.mean is not None:
            y = y - self._channels(self.mean, y)
        if self.std is not None:
            y = y / self._channels(self.std, y)
        return y

    @staticmethod
    def _channels(values: Tensor, x: Tensor) -> Tensor:
        return values.to(x.device).reshape(-1, *([1] * (x.ndim - 2)))


class Flatten:
    """(B, ...) to (B, D)."""

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        return x.flatten(1)


class Permute:
    """Reorder the values of each sample by its experience's permutation; the shape stays.

    Args:
        table: (T, D) int64; row t is the permutation of experience t, D the values of one sample.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        table, x_BD = self.table.to(x.device), x.flatten(1)
        if isinstance(experience, int):
            return x_BD.gather(1, table[experience].expand(x_BD.shape)).reshape(x.shape)
        y_BD = torch.empty_like(x_BD)
        for start in range(0, len(x), 256):  # the orders of a whole chunk are many times its bytes and leave the cache
            rows = slice(start, start + 256)
            torch.gather(x_BD[rows], 1, table.index_select(0, experience[rows]), out=y_BD[rows])
        return y_BD.reshape(x.shape)


class Rotate:
    """Turn each image (B, C, H, W) counter-clockwise by its experience's angle; bilinear, zeros outside.

    uint8 becomes float32 divided by `divisor` here (interpolating bytes would round), so no `Scale` need follow.

    Args:
        angles: (T,) degrees.
        divisor: bytes are divided by it.
    """

    def __init__(self, angles: Sequence[float] | Tensor, divisor: float = 255.0) -> None:
        self.angles = torch.as_tensor(angles, dtype=torch.float64)
        self.divisor = divisor
        self._grids: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        y = x if x.is_floating_point() else x.to(torch.float32).div_(self.divisor)
        grids = self._grid(x.shape[-2], x.shape[-1]).to(x.device)
        if isinstance(experience, int):
            grid_BHW2 = grids[experience].expand(x.shape[0], -1, -1, -1)
        else:
            grid_BHW2 = grids.index_select(0, experience)
        return F.grid_sample(y, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _grid(self, height: int, width: int) -> Tensor:
        """(T, H, W, 2) sampling positions; made once, and not by a matrix product, whose bits vary with T."""
        if (height, width) not in self._grids:
            ys = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None]
            xs = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2)[None, :]
            turn = self.angles * (math.pi / 180)
            cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
            # image rows point down, so a counter-clockwise turn reads from the position turned clockwise
            grid = torch.stack(((cos * xs - sin * ys) * (2 / width), (sin * xs + cos * ys) * (2 / height)), dim=-1)
            self._grids[height, width] = grid.to(torch.float32)
        return self._grids[height, width]


class Augment:
    """Random crop after zero padding and random horizontal flip of images (B, C, H, W); nothing outside training.

    Args:
        padding: zeros on each side before a crop of the original size.
        flip: whether half of the images are mirrored.
    """

    stochastic = True

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        self.padding = padding
        self.flip = flip

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        if not train:
            return x
        (n, channels, height, width), pad = x.shape, self.padding
        draw = torch.rand((3, n, 1), generator=generator).to(x.device)
        top, left = (draw[:2] * (2 * pad + 1)).long()
        rows_BH = torch.arange(height, device=x.device) + top
        columns_BW = torch.arange(width, device=x.device) + left
        if self.flip:
            columns_BW = torch.where(draw[2] < 0.5, columns_BW.flip(1), columns_BW)
        where = (rows_BH[:, :, None] * (width + 2 * pad) + columns_BW[:, None, :]).reshape(n, 1, -1)
        padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
        return padded.gather(2, where.expand(-1, channels, -1)).reshape(x.shape)


class Tokens:
    """Token ids as int64, otherwise as they are."""

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        return x.to(torch.int64)


class Chain:
    """One transform after the other."""

    def __init__(self, *transforms: BatchTransform) -> None:
        self.transforms = transforms
        self.stochastic = any(map(is_stochastic, transforms))

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        for transform in self.transforms:
            x = transform(x, experience, train=train, generator=generator)
        return x
