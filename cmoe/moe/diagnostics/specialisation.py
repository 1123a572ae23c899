"""How much experts and tasks tell about each other, from a table of counts: a row per task, a column per expert.

Entries are assignments, so that a token with several experts counts once for each. All in float64 and nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mutual_information(counts_ME: Tensor) -> float:
    """I(task; expert) = Σ p(m, e) log(p(m, e) / (p(m) p(e))); nan for an empty table.

    What the loss of Mod-Squad (Chen et al. 2023, https://arxiv.org/abs/2212.08066) raises. 0 when every task uses the
    experts alike, at most the smaller of the two entropies.
    """
    joint_ME = _shares(counts_ME)
    if joint_ME is None:
        return float("nan")
    independent_ME = joint_ME.sum(1, keepdim=True) * joint_ME.sum(0, keepdim=True)
    used_ME = joint_ME > 0
    ratio = (joint_ME[used_ME] / independent_ME[used_ME]).log()
    return max(float((joint_ME[used_ME] * ratio).sum()), 0.0)  # rounding may leave −1e−17


def normalised_mutual_information(counts_ME: Tensor) -> float:
    """I(task; expert) over the smaller of the two entropies, in 0 … 1; nan where that entropy is 0.

    1 says that the expert tells the task, or (with fewer experts than tasks) the task the expert.
    """
    joint_ME = _shares(counts_ME)
    if joint_ME is None:
        return float("nan")
    if min(int((joint_ME > 0).any(d).sum()) for d in (0, 1)) < 2:  # not by the entropy, which rounding makes 1e−16
        return float("nan")
    most = min(_entropy(joint_ME.sum(1)), _entropy(joint_ME.sum(0)))
    return min(mutual_information(counts_ME) / most, 1.0)


def purity(counts_ME: Tensor) -> float:
    """Share of all assignments that are of their expert's main task; 1 / M at least, nan for an empty table."""
    joint_ME = _shares(counts_ME)
    return float("nan") if joint_ME is None else float(joint_ME.max(0).values.sum())


def purity_of_experts(counts_ME: Tensor) -> Tensor:
    """Share of each expert's load that comes from its main task, (E,); nan for one without load."""
    counts_ME = counts_ME.double()
    if not counts_ME.shape[0]:
        return counts_ME.new_full((counts_ME.shape[1],), float("nan"))
    return counts_ME.max(0).values / counts_ME.sum(0)


def _shares(counts_ME: Tensor) -> Tensor | None:
    total = counts_ME.double().sum()
    return counts_ME.double() / total if counts_ME.numel() and total > 0 else None


def _entropy(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum())
