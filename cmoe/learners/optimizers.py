"""Optimizers by name; torch's own, with the options that a configuration may set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cmoe.config.types import Fraction, NonNegative, Positive


@dataclass
class SGD:
    """Stochastic gradient descent (torch.optim.SGD).

    Options:
        lr: learning rate.
        momentum: share of the last update that is kept.
        nesterov: Nesterov's momentum.
        weight_decay: L2 penalty added to the gradient.
    """

    lr: Positive = 0.1
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass
class Adam:
    """Adam (Kingma & Ba 2015; torch.optim.Adam).

    Options:
        lr: learning rate.
        beta1: decay of the gradient's mean.
        beta2: decay of the squared gradient's mean.
        eps: added to the denominator.
        weight_decay: L2 penalty added to the gradient.
    """

    lr: Positive = 1e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        # fused: a third of the time on a CPU, where most small runs are
        betas = (self.beta1, self.beta2)
        return torch.optim.Adam(parameters, self.lr, betas, self.eps, self.weight_decay, fused=True)


@dataclass
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019; torch.optim.AdamW).

    Options:
        lr: learning rate.
        beta1: decay of the gradient's mean.
        beta2: decay of the squared gradient's mean.
        eps: added to the denominator.
        weight_decay: share of a weight, times lr, that a step takes off.
    """

    lr: Positive = 1e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(parameters, self.lr, betas, self.eps, self.weight_decay, fused=True)


OptimizerOptions = SGD | Adam | AdamW
