"""Routers: presets of parts, and a file of its own for each method that is its own."""

from cmoe.moe.routers.adaptive import NullExperts, ReLU, Threshold
from cmoe.moe.routers.balanced import Base, Sinkhorn
from cmoe.moe.routers.contextual import Attention, KMeans, Recurrent
from cmoe.moe.routers.dselect import DSelectK
from cmoe.moe.routers.expert_choice import ExpertChoice
from cmoe.moe.routers.hierarchical import Hierarchical
from cmoe.moe.routers.labelled import PerTask, TaskEmbedding
from cmoe.moe.routers.presets import (
    Cosine,
    Dense,
    FrozenRandom,
    Gaussian,
    GShard,
    Hash,
    Laplace,
    NoisyTopK,
    PerturbedCosine,
    Prototypes,
    Quadratic,
    Random,
    SigmoidBias,
    StudentT,
    Switch,
    TopP,
)
from cmoe.moe.routers.product_keys import ProductKeys
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routers.smear import Smear
from cmoe.moe.routers.soft import Soft
from cmoe.moe.routers.sparsemixer import SparseMixer
from cmoe.moe.routers.stable import StableMoE
from cmoe.moe.routers.table import TaskTable
from cmoe.moe.routers.topk import TopK

ROUTERS = {
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "switch": Switch,
    "gshard": GShard,
    "dense": Dense,
    "hierarchical": Hierarchical,
    "prototypes": Prototypes,
    "cosine": Cosine,
    "perturbed_cosine": PerturbedCosine,
    "gaussian": Gaussian,
    "student_t": StudentT,
    "laplace": Laplace,
    "quadratic": Quadratic,
    "sigmoid_bias": SigmoidBias,
    "relu": ReLU,
    "top_p": TopP,
    "null_experts": NullExperts,
    "threshold": Threshold,
    "hash": Hash,
    "random": Random,
    "frozen_random": FrozenRandom,
    "base": Base,
    "sinkhorn": Sinkhorn,
    "sparsemixer": SparseMixer,
    "attention": Attention,
    "recurrent": Recurrent,
    "kmeans": KMeans,
    "expert_choice": ExpertChoice,
    "dselect_k": DSelectK,
    "stable_moe": StableMoE,
    "product_keys": ProductKeys,
    "soft": Soft,
    "smear": Smear,
    "task_table": TaskTable,
    "task_embedding": TaskEmbedding,
    "per_task": PerTask,
}

__all__ = ["ROUTERS", "Scored", "TaskTable", "TopK"]
