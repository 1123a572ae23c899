"""A network as it was, whose answers others are held to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cmoe.learners.model import Model
from cmoe.strategies.base import Context


def teacher(context: Context, structure: dict[str, Any], weights: dict[str, Tensor]) -> Model:
    """A model of the run's configuration with these weights, on its device, in evaluation mode and never trained.

    Args:
        context: the run's.
        structure: what `Model.structure` gave.
        weights: what `Model.state_dict` gave at the same moment.
    """
    made = context.fresh_model("teacher")
    made.restore_structure(structure)
    made.load_state_dict(weights)
    return made.to(context.device).eval().requires_grad_(False)


def as_it_is(context: Context) -> Model:
    """The run's model as it is now."""
    return teacher(context, context.model.structure(), context.model.state_dict())


def state_of(made: Model | None) -> dict[str, Any]:
    """What `restored` takes; empty without a teacher."""
    return {} if made is None else {"structure": made.structure(), "weights": made.state_dict()}


def restored(context: Context, state: dict[str, Any]) -> Model | None:
    """The teacher whose state this is; None where there was none."""
    return teacher(context, state["structure"], state["weights"]) if state else None
