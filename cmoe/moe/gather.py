"""Linear maps of rows with a copy of its expert's weights for each: for many tiny experts with few rows each.

One product per expert costs a call whatever its size; where experts have a single hidden unit (PEER, He 2024,
https://arxiv.org/abs/2407.04153) that is nearly all there is. Here weights are fetched row by row instead. A row's output
depends on no other row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from cmoe.moe.experts.base import Expert

# measured on CPU in float32, forward and backward, experts of 128 to 2048 weights, 1 to 16 rows each: up to this many
# weights fetched for each expert it was 1.3 to 60 times as fast as one product per expert, from twice as many it was slower
FETCHED = 4096
MANY = 64  # experts; with few there is little to win


def gathered_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, expert_N: Tensor) -> Tensor:
    """Each row times the weight of its expert, plus its bias, (N, O)."""
    inputs, outputs = weight_EIO.shape[1:]
    own_NIO = F.embedding(expert_N, weight_EIO.flatten(1)).unflatten(1, (inputs, outputs))
    if outputs == 1:  # a product of two vectors, or a vector times a number: quicker than products of matrices
        y_NO = (x_NI * own_NIO.squeeze(2)).sum(1, keepdim=True)
    elif inputs == 1:
        y_NO = x_NI * own_NIO.squeeze(1)
    else:
        y_NO = torch.bmm(x_NI.unsqueeze(1), own_NIO).squeeze(1)
    return y_NO if bias_EO is None else y_NO + F.embedding(expert_N, bias_EO)


def pays(expert: Expert, counts: Sequence[int], x_ND: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is quicker than a product per expert for a cohort with these row counts."""
    if len(counts) < MANY or x_ND.dim() > 2 or x_ND.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    one = sum(p[0].numel() for p in expert.stacked() if p is not None)
    return len(x_ND) * one <= FETCHED * len(counts)
