"""What a layer is given and gives, overheard while the whole model works."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cmoe.moe.routing import Routing

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer


class Tap:
    """What a layer was last given and gave.

    Attributes:
        arguments, options: of its forward.
        output: (..., O).
        routing: beside it.
    """

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Tensor
    routing: Routing

    def tokens(self) -> Tensor:
        """The output as a row for each token, or for each unit of several places."""
        return self.output.reshape(self.routing.ids.shape[0], -1)


@contextmanager
def tapped(layer: MoELayer) -> Generator[Tap]:
    """Inside, what the layer does is in the tap."""
    tap = Tap()

    def listen(_: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: tuple[Tensor, Routing]) -> None:
        tap.arguments, tap.options, (tap.output, tap.routing) = arguments, options, result

    handle = layer.register_forward_hook(listen, with_kwargs=True)
    try:
        yield tap
    finally:
        handle.remove()
