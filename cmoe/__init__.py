"""Continual and multi-task learning with Mixture-of-Experts models.

import cmoe
run = cmoe.run("quickstart", "strategy=replay")
print(run.facts()["metrics"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmoe.api import resume, run
    from cmoe.errors import RunFailed, UserError
    from cmoe.reporting import Reporter

__version__ = "0.1.0"

# imported when first used: `cmoe --help` must not wait for torch
_HOME = {
    "Reporter": "cmoe.reporting",
    "RunFailed": "cmoe.errors",
    "UserError": "cmoe.errors",
    "resume": "cmoe.api",
    "run": "cmoe.api",
}

__all__ = ["Reporter", "RunFailed", "UserError", "__version__", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cmoe' has no attribute '{name}'")
