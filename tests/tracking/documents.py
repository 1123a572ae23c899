"""What a row may say of experts, made up."""

from __future__ import annotations

from typing import Any

import numpy as np

PAIRS = ("cosine", "cka", "disagreement")


def answers(rng: np.random.Generator, experiences: int) -> dict[str, Any]:
    """Accuracy and calibration with some empty bins."""
    bins = [[int(n), None, None] if n < 8 else [int(n), (b + 0.5) / 15, float(rng.random())]
            for b, n in enumerate(rng.integers(0, 40, 15))]  # fmt: skip
    return {
        "accuracy": float(rng.random()),
        "ece": float(rng.random()),
        "nll": float(rng.random()),
        "brier": float(rng.random()),
        "accuracies": rng.random(experiences).tolist(),
        "reliability": bins,
    }


def document(
    layers: int = 2, experts: int = 3, experiences: int = 2, level: str = "all", seed: int = 0
) -> dict[str, Any]:
    """A row after the last of some experiences."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {
        "row": experiences - 1,
        "level": level,
        "experiences": list(range(experiences)),
        "names": [f"experience ${j}$ with a long name" for j in range(experiences)],
        "drift": [None if j == experiences - 1 else float(rng.random()) for j in range(experiences)],
        "reasons": {},
        "layers": {},
    }
    if level == "all":
        found |= {"view": "class_il", "samples": [9] * experiences, "model": answers(rng, experiences)}
    for k in range(layers):
        pairs = rng.random((3, experts, experts))
        layer = {
            "experts": list(range(experts)),
            "reasons": {},
            "load": rng.integers(0, 50, (experiences, experts)).tolist(),
            "dead": [0],
            "purity_of_experts": [None, *rng.random(experts - 1).tolist()],
            **{name: float(rng.random()) for name in (
                "load_cv", "load_max_over_mean", "load_entropy", "entropy", "dropped_share", "unserved_share",
                "flops_per_token", "task_information", "task_information_normalised", "task_purity")},
        }  # fmt: skip
        if level == "all":
            layer |= {
                "pairs": {name: ((p + p.T) / 2).tolist() for name, p in zip(PAIRS, pairs, strict=True)},
                "cosine": 0.1, "cka": 0.2, "disagreement": 0.3,
                "alone": [answers(rng, experiences) for _ in range(experts)],
                "without": [answers(rng, experiences) for _ in range(experts)],
                "pools": {name: answers(rng, experiences) for name in ("uniform", "log", "gate")},
            }  # fmt: skip
        found["layers"][f"blocks.{k}.mlp"] = layer
    return found
