"""Mixture of Experts with experts as a run-time resource; depends on torch alone.

from cmoe.moe import MoELayer
"""

from cmoe.moe import diagnostics, losses
from cmoe.moe.experts import EXPERTS, FFN, Expert, Linear
from cmoe.moe.layer import MoELayer
from cmoe.moe.optimizer import ParameterChange, carry_state, migrate_optimizer
from cmoe.moe.routers import ROUTERS, TaskTable, TopK
from cmoe.moe.routing import (
    RouteContext,
    Router,
    Routing,
    UniformRouting,
    passed_on,
)
from cmoe.moe.view import NONE, ExpertView

__all__ = [
    "EXPERTS",
    "FFN",
    "NONE",
    "ROUTERS",
    "Expert",
    "ExpertView",
    "Linear",
    "MoELayer",
    "ParameterChange",
    "RouteContext",
    "Router",
    "Routing",
    "TaskTable",
    "TopK",
    "UniformRouting",
    "carry_state",
    "diagnostics",
    "losses",
    "migrate_optimizer",
    "passed_on",
]
