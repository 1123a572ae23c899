"""Mixture of Experts with experts as a run-time resource; depends on torch alone.

from cmoe.moe import MoELayer
"""

from cmoe.moe import diagnostics, losses
from cmoe.moe.allocator import keep_memory
from cmoe.moe.attention import HeadLayer, MoA, MoH
from cmoe.moe.depths import Depths, MixtureOfDepths
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

from cmoe.moe import surgery  # isort: skip - made of all of the above

__all__ = [
    "EXPERTS",
    "FFN",
    "NONE",
    "ROUTERS",
    "Depths",
    "Expert",
    "ExpertView",
    "HeadLayer",
    "Linear",
    "MixtureOfDepths",
    "MoA",
    "MoELayer",
    "MoH",
    "ParameterChange",
    "RouteContext",
    "Router",
    "Routing",
    "TaskTable",
    "TopK",
    "UniformRouting",
    "carry_state",
    "diagnostics",
    "keep_memory",
    "losses",
    "migrate_optimizer",
    "passed_on",
    "surgery",
]
