"""What makes a learner continual: one file per strategy, composed in a list."""

from cmoe.strategies.a_gem import AGEM
from cmoe.strategies.avalanche import Avalanche
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.collapse import Collapse
from cmoe.strategies.consistency import Consistency
from cmoe.strategies.cumulative import Cumulative
from cmoe.strategies.der import DER
from cmoe.strategies.er_ace import ERACE
from cmoe.strategies.expand import Expand
from cmoe.strategies.fdr import FDR
from cmoe.strategies.gdumb import GDumb
from cmoe.strategies.gem import GEM
from cmoe.strategies.joint import Joint
from cmoe.strategies.lwf import LwF
from cmoe.strategies.merge_experts import MergeExperts
from cmoe.strategies.mir import MIR
from cmoe.strategies.naive import Naive
from cmoe.strategies.online_ewc import OnlineEWC
from cmoe.strategies.prune import Prune
from cmoe.strategies.replay import Replay
from cmoe.strategies.separate import Separate
from cmoe.strategies.upcycle import Upcycle

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "FDR",
    "GEM",
    "MIR",
    "Avalanche",
    "Collapse",
    "Consistency",
    "Context",
    "Cumulative",
    "Expand",
    "GDumb",
    "Joint",
    "LwF",
    "MergeExperts",
    "Naive",
    "OnlineEWC",
    "Phase",
    "Prune",
    "Replay",
    "Segment",
    "Separate",
    "Strategy",
    "Upcycle",
]
