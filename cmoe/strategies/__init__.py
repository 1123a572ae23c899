"""What makes a learner continual: one file per strategy, composed in a list."""

from cmoe.strategies.avalanche import Avalanche
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.cumulative import Cumulative
from cmoe.strategies.expand import Expand
from cmoe.strategies.joint import Joint
from cmoe.strategies.lwf import LwF
from cmoe.strategies.naive import Naive
from cmoe.strategies.online_ewc import OnlineEWC
from cmoe.strategies.replay import Replay
from cmoe.strategies.separate import Separate

__all__ = [
    "Avalanche",
    "Context",
    "Cumulative",
    "Expand",
    "Joint",
    "LwF",
    "Naive",
    "OnlineEWC",
    "Phase",
    "Replay",
    "Segment",
    "Separate",
    "Strategy",
]
