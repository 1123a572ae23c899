"""What makes a learner continual: one file per strategy, composed in a list."""

from cmoe.strategies.a_gem import AGEM
from cmoe.strategies.avalanche import Avalanche
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.collapse import Collapse
from cmoe.strategies.consistency import Consistency
from cmoe.strategies.cumulative import Cumulative
from cmoe.strategies.der import DER
from cmoe.strategies.er_ace import ERACE
from cmoe.strategies.ewc import EWC
from cmoe.strategies.expand import Expand
from cmoe.strategies.fdr import FDR
from cmoe.strategies.gdumb import GDumb
from cmoe.strategies.gem import GEM
from cmoe.strategies.hat import HAT
from cmoe.strategies.icarl import ICaRL
from cmoe.strategies.infer_autoencoder import InferAutoencoder
from cmoe.strategies.infer_entropy import InferEntropy
from cmoe.strategies.infer_gaussian import InferGaussian
from cmoe.strategies.infer_prototype import InferPrototype
from cmoe.strategies.infer_task import InferTask
from cmoe.strategies.joint import Joint
from cmoe.strategies.lwf import LwF
from cmoe.strategies.mas import MAS
from cmoe.strategies.merge_experts import MergeExperts
from cmoe.strategies.mir import MIR
from cmoe.strategies.naive import Naive
from cmoe.strategies.ncm import NCM
from cmoe.strategies.online_ewc import OnlineEWC
from cmoe.strategies.packnet import PackNet
from cmoe.strategies.pnn import PNN
from cmoe.strategies.prune import Prune
from cmoe.strategies.replay import Replay
from cmoe.strategies.rwalk import RWalk
from cmoe.strategies.seed import SEED
from cmoe.strategies.separate import Separate
from cmoe.strategies.si import SI
from cmoe.strategies.slda import SLDA
from cmoe.strategies.upcycle import Upcycle
from cmoe.strategies.xdg import XdG

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "EWC",
    "FDR",
    "GEM",
    "HAT",
    "MAS",
    "MIR",
    "NCM",
    "PNN",
    "SEED",
    "SI",
    "SLDA",
    "Avalanche",
    "Collapse",
    "Consistency",
    "Context",
    "Cumulative",
    "Expand",
    "GDumb",
    "ICaRL",
    "InferAutoencoder",
    "InferEntropy",
    "InferGaussian",
    "InferPrototype",
    "InferTask",
    "Joint",
    "LwF",
    "MergeExperts",
    "Naive",
    "OnlineEWC",
    "PackNet",
    "Phase",
    "Prune",
    "RWalk",
    "Replay",
    "Segment",
    "Separate",
    "Strategy",
    "Upcycle",
    "XdG",
]
