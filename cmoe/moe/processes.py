"""Training in several processes, each of which waits for every parameter's gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def distributed() -> bool:
    """Whether other processes wait for every parameter's gradient, those of experts without a token included."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reached(y: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """y as it is, after which each parameter of the modules that learns has a gradient, be it 0.

    `DistributedDataParallel` reduces a parameter when its gradient is there: that of a parameter without a part in y would
    never come.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _Reached.apply(y, *parameters) if parameters and torch.is_grad_enabled() else y


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *(torch.zeros_like(p) for p in ctx.saved_tensors))
