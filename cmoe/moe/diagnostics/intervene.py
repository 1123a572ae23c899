"""A layer with one expert alone, or without one: for questions of the kind "what if", asked in evaluation mode.

Hooks on the layer's router do it, so that any backbone can be asked and nothing of the layer changes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cmoe.moe.routers.table import TaskTable
from cmoe.moe.routing import RouteContext, Router, Routing, score_dtype
from cmoe.moe.view import NONE

if TYPE_CHECKING:
    from cmoe.moe.layer import MoELayer


def reachable(layer: MoELayer, task: int | None) -> tuple[int, ...]:
    """Ids of the experts that the router may choose for a task label."""
    router, view = layer.router, layer.view
    if task is None:
        return layer.ids
    if isinstance(router, TaskTable):
        return router.experts_of(task, view)
    if getattr(router, "restrict", "none") == "task":
        return view.tasks.get(task) or layer.ids
    return layer.ids


@contextmanager
def alone(layer: MoELayer, expert: int) -> Generator[None]:
    """Inside, this expert works on every token of the layer with weight 1, whatever the router says.

    What the router hands on to later layers stays as it is, and so does what the layer gives beside its experts.

    Raises:
        ValueError: the layer has no such expert.
    """
    layer.check_ids([expert])
    with _routed(layer, expert):
        yield


@contextmanager
def silent(layer: MoELayer) -> Generator[None]:
    """Inside, no expert works on any token of the layer."""
    with _routed(layer, NONE):
        yield


@contextmanager
def without(layer: MoELayer, expert: int, task: int | None = None) -> Generator[None]:
    """Inside, the router chooses among the other experts: what is left of the layer when this one is removed.

    Where the task label allows no other expert, nobody works on the tokens: 0 from the experts, and what the layer gives
    beside them.

    Args:
        layer: in evaluation mode.
        expert: the id to leave out.
        task: the label of all tokens, as in their context.

    Raises:
        ValueError: the layer has no such expert.
    """
    layer.check_ids([expert])
    others = tuple(e for e in layer.ids if e != expert)

    def hidden(router: Router, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, context, *rest = arguments
        assert isinstance(context, RouteContext)
        seen = others if context.visible is None else tuple(e for e in others if e in context.visible)
        return (x_TD, replace(context, visible=seen), *rest)

    if not set(others) & set(reachable(layer, task)):
        with _routed(layer, NONE):
            yield
        return
    handle = layer.router.register_forward_pre_hook(hidden)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _routed(layer: MoELayer, expert: int) -> Generator[None]:
    """Inside, this expert, or nobody, for every token; what later layers are told stays."""

    def replaced(router: Router, arguments: tuple[Any, ...], routing: Routing) -> Routing:
        x_TD, context, *_ = arguments
        ids_T1 = torch.full((x_TD.shape[0], 1), expert, dtype=torch.int64, device=x_TD.device)
        if context.valid is not None:
            ids_T1 = ids_T1.masked_fill(~context.valid.unsqueeze(1), NONE)
        weights_T1 = (ids_T1 != NONE).to(score_dtype(x_TD.dtype))
        return Routing(ids_T1, weights_T1, columns=routing.columns, state=routing.state, valid=context.valid)

    handle = layer.router.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
