"""Which strategies cannot stand beside another one."""

from __future__ import annotations

from collections.abc import Mapping

from cmoe.errors import UserError
from cmoe.strategies.base import Context


def refuse_beside(context: Context, mine: str, others: Mapping[str, str]) -> None:
    """Refuse a run that has one of `others` beside `mine`.

    Args:
        context: the run's.
        mine: the name of a strategy.
        others: names of strategies, each with the reason in words.

    Raises:
        UserError: it has.
    """
    for spec in context.options["strategy"]:
        if (name := spec["name"]) in others:
            raise UserError(f"strategy.{mine}: expected no '{name}' beside it, {others[name]}, got it")
