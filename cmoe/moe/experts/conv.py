"""Convolutional experts on feature maps, as mixtures inside convolutional networks have them (Pavlitska et al. 2022,
https://arxiv.org/abs/2204.10598)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Fraction, PositiveInt
from cmoe.moe.experts.base import ACTIVATIONS, Expert, LinearMap, dense_linear, init_linear
from cmoe.moe.grouped import Rows


class Conv(Expert):
    """Two convolutions with an activation between them; the router chooses for a whole feature map by its mean.

    A unit is a map (H, W, D), channels last; its size stays. Parameters: `w1` (E, H, D, k, k), `b1` (E, H), `w2`
    (E, O, H, k, k), `b2` (E, O). Separable: a convolution `w0` (E, D, 1, k, k) of each channel by itself, then `w1` and
    `w2` of one pixel (the order of a ConvNeXt block, Liu et al. 2022). Without `hidden`, H is D. Experts with as many
    maps each run as one grouped convolution, others one after the other; there is no `dispatch: grouped`.

    Options:
        kernel: side k of a kernel in pixels, odd.
        separable: one convolution over each channel and two of one pixel instead of two full ones.
        activation: 'gelu', 'relu', 'silu', 'tanh' or 'none'.
        dropout: share of hidden values that is dropped while training.
        init: 'uniform' (as nn.Conv2d), 'xavier' or 'normal' (standard deviation 0.02).
        bias: whether the convolutions have a bias.
    """

    inner: ClassVar[int] = 2
    paths: ClassVar[tuple[str, ...]] = ("loop", "bmm", "dense")

    def __init__(
        self,
        n: int,
        dim: int,
        hidden: int | None,
        out_dim: int,
        kernel: PositiveInt = 3,
        separable: bool = False,
        activation: Literal["gelu", "relu", "silu", "tanh", "none"] = "gelu",
        dropout: Fraction = 0.0,
        init: Literal["uniform", "xavier", "normal"] = "uniform",
        bias: bool = True,
    ) -> None:
        hidden = hidden or dim
        super().__init__(n, dim, hidden, out_dim)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"conv: kernel: expected an odd number, so that maps keep their size, got {kernel}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"conv: activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.dropout, self.init = activation, dropout, init
        self.widens = not separable  # the convolution of each channel would be one for both
        k = 1 if separable else kernel
        self.w0 = nn.Parameter(torch.zeros(n, dim, 1, kernel, kernel)) if separable else None
        self.b0 = nn.Parameter(torch.zeros(n, dim)) if separable and bias else None
        self.w1 = nn.Parameter(torch.zeros(n, hidden, dim, k, k))
        self.b1 = nn.Parameter(torch.zeros(n, hidden)) if bias else None
        self.w2 = nn.Parameter(torch.zeros(n, out_dim, hidden, k, k))
        self.b2 = nn.Parameter(torch.zeros(n, out_dim)) if bias else None

    def stacked(self) -> tuple[Tensor | None, ...]:
        return self.w0, self.b0, self.w1, self.b1, self.w2, self.b2

    def compute(self, x: Tensor, linear: LinearMap, *parameters: Tensor | None) -> Tensor:
        """Maps (N, H, W, D) through parameters of one expert, or (E, N, H, W, D) through those of each."""
        w0, b0, w1, b1, w2, b2 = parameters
        assert w1 is not None
        assert w2 is not None
        # channels behind experts: a view for one expert, one copy for several
        h = x.permute(0, 3, 1, 2) if x.dim() == 4 else x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
        if w0 is not None:
            h = _convolution(h, w0, b0, each_channel=True)
        h = ACTIVATIONS[self.activation](_convolution(h, w1, b1))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        h = _convolution(h, w2, b2).permute(0, 2, 3, 1)
        return h if x.dim() == 4 else h.unflatten(3, (len(x), -1)).permute(3, 0, 1, 2, 4)

    def on_rows(self, x_ND: Tensor, rows: Rows, stacked: Sequence[Tensor | None]) -> Tensor:
        each = zip(*([None] * len(rows.counts) if p is None else p.unbind(0) for p in stacked), strict=True)
        parts = x_ND.split(rows.counts)
        out = [self.compute(x, dense_linear, *own) for x, own in zip(parts, each, strict=True) if len(x)]
        # without a map, an empty batch through the first expert keeps all parameters in the graph
        first = [p if p is None else p.select(0, 0) for p in stacked]
        return torch.cat(out) if out else self.compute(x_ND, dense_linear, *first)

    def units(self) -> dict[str, tuple[int, int]]:
        held = {"w1": (0, 1), "b1": (0, 1), "w2": (1, 1)}
        return {name: where for name, where in held.items() if getattr(self, name) is not None}

    def flops_per_token(self) -> int:
        return sum(2 * p[0].numel() for p in (self.w0, self.w1, self.w2) if p is not None)

    def reset_parameters(self) -> None:
        for weight, bias in ((self.w0, self.b0), (self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None:
                _, outs, ins, height, width = weight.shape
                init_linear(weight, bias, self.init, ins * height * width, outs * height * width)

    @torch.no_grad()
    def zero_output(self) -> None:
        self.w2.zero_()
        if self.b2 is not None:
            self.b2.zero_()


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, each_channel: bool = False) -> Tensor:
    """Maps (N, I, H, W), or of all experts beside each other (N, E · I, H, W); weight (O, I, k, k) or (E, O, I, k, k)."""
    experts = 1
    if weight.dim() == 5:
        experts, weight = len(weight), weight.flatten(0, 1)
    groups = x.shape[1] if each_channel else experts
    return F.conv2d(x, weight, None if bias is None else bias.reshape(-1), padding=weight.shape[-1] // 2, groups=groups)
