"""Gates on the hidden units of a multilayer perceptron, by the task label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cmoe.backbones.mlp import MLP
from cmoe.errors import UserError
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context

Gate = Callable[[int, RouteContext], Tensor]

_UNGATED = "the other network that it makes would have no gates"
BESIDE = {
    **dict.fromkeys(("lwf", "separate"), _UNGATED),
    "upcycle": "it makes other layers of those whose units have gates",
}


def hidden_layers(context: Context, name: str) -> list[nn.Linear]:
    """The layers whose units strategy `name` can gate, in the order of depth.

    Raises:
        UserError: the model has no such layers.
    """
    backbone = context.model.backbone
    if not isinstance(backbone, MLP):
        raise UserError(
            f"strategy.{name}: expected model.name 'mlp', on whose hidden units it puts gates, got "
            f"'{context.options['model']['name']}'"
        )
    layers = [layer for layer in backbone.layers if isinstance(layer, nn.Linear)]
    if len(layers) < len(backbone.layers):
        raise UserError(f"strategy.{name}: expected a model without experts, got model.moe")
    if not layers:
        raise UserError(f"strategy.{name}: expected model.hidden with at least one layer, got none")
    return layers


def place(backbone: nn.Module, layers: list[nn.Linear], gate: Gate) -> None:
    """Multiply the activities of hidden layers by gates wherever a forward is given a task label.

    Args:
        backbone: called with inputs and a `RouteContext`.
        layers: as `hidden_layers` gives them.
        gate: (layer's index, context with a task label) -> (H,) or, for a label a sample, (B, H); not negative.
    """
    given: list[RouteContext] = []

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        given[:] = [args[1]]

    backbone.register_forward_pre_hook(remember)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(_gated(i, given, gate))


def _gated(i: int, given: list[RouteContext], gate: Gate) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if given[0].task is None:
            return None
        # before the ReLU, which a factor that is not negative passes
        return output * gate(i, given[0]).to(output.dtype)

    return hook
