"""What a routing, a layer and its experts look like from outside; nothing here is part of a training step.

- `load`: who does how much. `flow`: the same over many batches, with entropy, dropped assignments and cost.
- `specialisation`: how much an expert says about the task (mutual information, purity).
- `similarity`: how alike experts are (cosine and CKA of their outputs, disagreement of their predictions).
- `intervene`: the layer with one expert alone, or without one, weights and counters untouched; `listen`: what it does.

Functions of a `Routing` read it after the fact (they wait for the device).
"""

from cmoe.moe.diagnostics.flow import Flow, active_flops, flops_per_token, router_entropy
from cmoe.moe.diagnostics.intervene import alone, reachable, silent, without
from cmoe.moe.diagnostics.listen import Tap, tapped
from cmoe.moe.diagnostics.load import add_loads, dead, load, load_cv, load_entropy, max_over_mean
from cmoe.moe.diagnostics.similarity import disagreement, linear_cka, mean_of_pairs, pairwise_cosine
from cmoe.moe.diagnostics.specialisation import (
    mutual_information,
    normalised_mutual_information,
    purity,
    purity_of_experts,
)

__all__ = [
    "Flow",
    "Tap",
    "active_flops",
    "add_loads",
    "alone",
    "dead",
    "disagreement",
    "flops_per_token",
    "linear_cka",
    "load",
    "load_cv",
    "load_entropy",
    "max_over_mean",
    "mean_of_pairs",
    "mutual_information",
    "normalised_mutual_information",
    "pairwise_cosine",
    "purity",
    "purity_of_experts",
    "reachable",
    "router_entropy",
    "silent",
    "tapped",
    "without",
]
