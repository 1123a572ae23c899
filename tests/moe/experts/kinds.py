"""Every kind of expert, small, and how a layer of it is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmoe.moe import MoELayer, Router, Routing

_spec = importlib.util.spec_from_file_location("moe_reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

DIM, HIDDEN, UNITS = 8, 16, 23
KINDS: dict[str, dict[str, Any]] = {
    "ffn": {"name": "ffn", "activation": "swiglu"},
    "linear": {"name": "linear", "activation": "tanh"},
    "lora": {"name": "lora", "rank": 4},
    "adapter": {"name": "adapter", "bottleneck": 5},
    "conv": {"name": "conv"},
    "separable": {"name": "conv", "separable": True},
    "zero": {"name": "zero"},
    "copy": {"name": "copy"},
    "constant": {"name": "constant"},
}
FREE = ("zero", "copy")  # without parameters


class Fixed(Router):
    """Fixed: the routing it was given."""

    routing: Routing

    def forward(self, x_TD: Tensor, context: Any, experts: Any) -> Routing:
        return self.routing

    def experts_per_token(self, experts: Any) -> int:
        return 2


def layer_of(kind: str, router: Any = "topk", experts: int = 4, **options: Any) -> MoELayer:
    """A layer whose outputs are not zero anywhere, whatever the kind begins with."""
    layer = MoELayer(DIM, HIDDEN, experts=experts, expert=KINDS[kind], router=router, **options)
    return spoken(layer)


def spoken(layer: MoELayer) -> MoELayer:
    """The layer with random numbers where parameters were zero, and clear choices of the router."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("router"):
                p.normal_(0, 0.7)
            elif not p.any():
                p.normal_(0, 0.3)
    return layer


def units(kind: str, n: int = UNITS, seed: int = 0, **options: Any) -> Tensor:
    """Tokens, or maps for kinds that work on them."""
    shape = (n, 3, 4, DIM) if kind in ("conv", "separable") else (n, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)
