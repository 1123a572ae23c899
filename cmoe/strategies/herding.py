"""Herding: samples whose mean stays near the mean of all."""

from __future__ import annotations

import torch
from torch import Tensor


def herd(features_ND: Tensor, count: int) -> Tensor:
    """The rows, in order, of up to `count` samples whose running mean follows the mean of all (Welling 2009; iCaRL).

    One by one that sample is taken which brings the mean of those taken nearest to the mean of all; the first m of the
    order are what herding m would take.

    Args:
        features_ND: (N, D).
        count: how many.

    Returns:
        (min(count, N),) int64, on the CPU.
    """
    mean_D, total_D = features_ND.mean(0), torch.zeros_like(features_ND[0])
    free_N = torch.zeros(len(features_ND), dtype=features_ND.dtype, device=features_ND.device)
    # ‖m − (s + x)/k‖², but for what all rows share: ‖x‖²/k² − 2 x·(m − s/k)/k
    squares_N = features_ND.square().sum(1)
    order: list[int] = []
    for k in range(1, min(count, len(features_ND)) + 1):
        cost_N = squares_N / k - 2 * (features_ND @ (mean_D - total_D / k)) + free_N
        row = int(cost_N.argmin())
        order.append(row)
        total_D = total_D + features_ND[row]
        free_N[row] = torch.inf
    return torch.tensor(order, dtype=torch.int64)
