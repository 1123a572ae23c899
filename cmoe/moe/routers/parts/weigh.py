"""How much each chosen expert counts: from scores (T, E) and columns (T, K) to weights (T, K), 0 where nobody is."""

from __future__ import annotations

import torch
from torch import Tensor


def _without(weights_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    return weights_TK if absent_TK is None else weights_TK.masked_fill(absent_TK, 0.0)


def softmax_all(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """Probabilities among all experts: a sum of at most 1 (Switch, GShard)."""
    return _without(scores_TE.softmax(-1).gather(1, columns_TK), absent_TK)


def softmax_chosen(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """Softmax over the chosen ones: a sum of 1 (Mixtral)."""
    picked_TK = scores_TE.gather(1, columns_TK)
    if absent_TK is not None:
        # finite, so that a row without any expert has no NaN in its backward pass
        picked_TK = picked_TK.masked_fill(absent_TK, torch.finfo(picked_TK.dtype).min)
    return _without(picked_TK.softmax(-1), absent_TK)


def sigmoid_normed(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """Sigmoids of the chosen ones over their sum (DeepSeek-V3)."""
    picked_TK = _without(scores_TE.gather(1, columns_TK).sigmoid(), absent_TK)
    return picked_TK / picked_TK.sum(1, keepdim=True).clamp(min=1e-20)


def sigmoid(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """The chosen ones' sigmoids (BASE)."""
    return _without(scores_TE.gather(1, columns_TK).sigmoid(), absent_TK)


def relu(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """The positive parts of the scores (ReMoE)."""
    return _without(scores_TE.gather(1, columns_TK).relu(), absent_TK)


def equal(scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None) -> Tensor:
    """1 over the number of chosen experts; no gradient."""
    ones_TK = _without(torch.ones_like(columns_TK, dtype=scores_TE.dtype), absent_TK)
    return ones_TK / ones_TK.sum(1, keepdim=True).clamp(min=1.0)
