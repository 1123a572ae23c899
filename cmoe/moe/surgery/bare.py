"""Layers of experts inside models that know nothing of routing: a block that calls `mlp(x)` and expects a tensor."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmoe.moe.layer import MoELayer
from cmoe.moe.routing import RouteContext, Routing, passed_on


class Bare(nn.Module):
    """A layer of experts that takes a tensor and gives one.

    What its router decided is told to whoever listens (`routings`); nothing is kept otherwise.

    Attributes:
        layer: the layer of experts.
        described: how to build it again, plain; see `cmoe.moe.surgery.place`.

    Args:
        layer: see above.
        described: see above.
        channels_first: inputs are maps (N, C, H, W).
        after: dropout of the output.
    """

    def __init__(
        self, layer: MoELayer, described: dict[str, Any], *, channels_first: bool = False, after: float = 0.0
    ) -> None:
        super().__init__()
        self.layer, self.channels_first, self.described = layer, channels_first, described
        self.after = nn.Dropout(after) if after else nn.Identity()
        self._listener: _Listener | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), or (N, C, H, W) with `channels_first`, to (..., O) or (N, O, H, W)."""
        x = x.movedim(1, -1) if self.channels_first else x
        listener = self._listener
        y, routing = self.layer(x, None if listener is None else listener.told.context)
        if listener is not None:
            listener.told.hear(listener.name, routing)
        y = self.after(y)
        return y.movedim(-1, 1) if self.channels_first else y

    def listen(self, listener: _Listener | None) -> None:
        """Tell this one of every routing from now on; None is nobody."""
        self._listener = listener


@dataclass
class Routings:
    """What the layers inside a model decided, in the order in which they were called.

    Attributes:
        heard: (name of the layer, its routing).
        context: what the layers are told, such as the task label.
    """

    heard: list[tuple[str, Routing]] = field(default_factory=list)
    context: RouteContext | None = None

    def hear(self, name: str, routing: Routing) -> None:
        """Take in a routing; what its router remembers goes to the next layer."""
        self.heard.append((name, routing))
        if routing.state is not None:
            self.context = passed_on(self.context or RouteContext(), routing)

    def by_layer(self) -> dict[str, Routing]:
        """Each layer's last routing."""
        return dict(self.heard)

    def auxiliary(self) -> dict[str, Tensor]:
        """The routers' auxiliary losses by name, already weighted, summed over layers and calls."""
        total: dict[str, Tensor] = {}
        for _, routing in self.heard:
            for name, value in routing.aux.items():
                total[name] = total[name] + value if name in total else value
        return total

    def loss(self) -> Tensor:
        """The sum of all auxiliary losses: add it to the task's loss."""
        values = list(self.auxiliary().values())
        return torch.stack(values).sum() if values else torch.zeros(())


@dataclass(frozen=True)
class _Listener:
    name: str
    told: Routings


@contextmanager
def routings(model: nn.Module, context: RouteContext | None = None) -> Generator[Routings]:
    """Hear what the layers of experts inside a model decide, where its own forward drops it.

        with routings(model) as decided:
            loss = task_loss(model(x)) + decided.loss()

    Args:
        model: after `upcycle`.
        context: told to every layer, such as the task label.

    Raises:
        RuntimeError: somebody is listening already.
    """
    told = Routings(context=context)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Bare)}
    if any(module._listener is not None for module in found.values()):
        raise RuntimeError("routings: expected a model that nobody listens to, got one inside another `routings`")
    for name, module in found.items():
        module.listen(_Listener(f"{name}.layer", told))
    try:
        yield told
    finally:
        for module in found.values():
            module.listen(None)
