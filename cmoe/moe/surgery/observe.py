"""What reaches each layer of experts of a model, and what it makes of it, without a trace of having looked."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmoe.moe.layer import MoELayer
from cmoe.moe.lifecycle import mass
from cmoe.moe.routing import Routing
from cmoe.moe.surgery.report import layers

Run = Callable[[], Any]


@dataclass
class Seen:
    """What came to one layer.

    Attributes:
        mass: the sum of the router's weights by expert id, over all tokens.
        tokens: (N, D) or larger units, the first so many of the valid ones.
        outputs: (N, O) what the layer made of them.
    """

    mass: dict[int, float] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))


def observe(model: nn.Module, run: Run, limit: int = 4096) -> dict[str, Seen]:
    """What comes to every layer of experts while a model works in evaluation mode.

    Modes, counters of use, running statistics and the generators of random numbers are afterwards as before.

    Args:
        model: with layers of experts.
        run: calls the model on some inputs; no gradient is computed.
        limit: tokens kept of each layer.
    """
    found = {name: Seen() for name in layers(model)}
    handles = [
        layer.register_forward_hook(_Keep(found[name], limit), with_kwargs=True)
        for name, layer in layers(model).items()
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """In evaluation mode, and afterwards every module in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Keep:
    def __init__(self, seen: Seen, limit: int) -> None:
        self.seen, self.limit = seen, limit

    def __call__(
        self, layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Routing]
    ) -> None:
        x, (y, routing), seen = (args[0] if args else kwargs["x"]), output, self.seen
        for expert, weight in mass(routing, layer.ids).items():
            seen.mass[expert] = seen.mass.get(expert, 0.0) + weight
        room = self.limit - len(seen.tokens)
        if room <= 0:
            return
        tokens, outputs = (v.detach().flatten(0, v.dim() - 2 - layer.inner) for v in (x, y))
        if routing.valid is not None:
            rows = routing.valid.nonzero().squeeze(1)
            tokens, outputs = tokens.index_select(0, rows), outputs.index_select(0, rows)
        tokens, outputs = tokens[:room].clone(), outputs[:room].clone()
        fits = len(seen.tokens) and tokens.shape[1:] == seen.tokens.shape[1:]  # sequences of one length only
        if fits or not len(seen.tokens):
            seen.tokens = torch.cat([seen.tokens, tokens]) if fits else tokens
            seen.outputs = torch.cat([seen.outputs, outputs]) if fits else outputs
