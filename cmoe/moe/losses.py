"""Auxiliary routing losses as pure functions; none of them is multiplied by a weight here.

Each takes an optional `valid` mask (T,) that leaves padding out, and gives 0 for an empty batch instead of NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean(values_T: Tensor, valid: Tensor | None) -> Tensor:
    """Over the valid tokens (None: all)."""
    if valid is None:
        return values_T.sum() / max(values_T.numel(), 1)
    # where, not a product: a padded row may be anything, inf * 0 included
    return torch.where(valid, values_T, 0.0).sum() / valid.sum().clamp(min=1)


def cv_squared(amount_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance over squared mean: 0 when all are equal.

    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, equation 7. 0 for a single expert or for no amount at all.
    """
    mean = amount_E.mean()
    return (amount_E - mean).square().mean() / (mean.square() + 1e-10)


def importance(weights_TK: Tensor, columns_TK: Tensor, n: int) -> Tensor:
    """Sum of the combination weights that each of `n` columns gets (Shazeer et al. 2017, equation 6); shape (n,)."""
    total = weights_TK.new_zeros(n)
    return total.scatter_add(0, columns_TK.reshape(-1), weights_TK.reshape(-1))


def importance_loss(weights_TK: Tensor, columns_TK: Tensor, n: int) -> Tensor:
    """CV² of the importance (Shazeer et al. 2017, equation 7). Padding must have weight 0."""
    return cv_squared(importance(weights_TK, columns_TK, n))


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Expected number of tokens of each expert if its noise were drawn again (Shazeer et al. 2017, appendix A).

    P(x, i) = Φ((clean_i - kth largest of the others' noisy scores) / scale_i); the load of i is its sum over x.

    Args:
        clean_TE: scores without noise.
        noisy_TE: the same with noise.
        scale_TE: standard deviation of the noise.
        k: experts per token, less than E.
    """
    top = noisy_TE.topk(k + 1, dim=-1).values
    inside = top[:, k - 1 : k]  # the bar for an expert that is out
    outside = top[:, k : k + 1]  # the bar for one that is in, which does not count itself
    bar_TE = torch.where(noisy_TE > outside, outside, inside)
    probability_TE = 0.5 * (1 + torch.erf((clean_TE - bar_TE) / scale_TE / math.sqrt(2.0)))
    if valid is not None:
        probability_TE = torch.where(valid.unsqueeze(1), probability_TE, 0.0)
    return probability_TE.sum(0)


def load_loss(clean_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """CV² of the smooth load (Shazeer et al. 2017, equation 11); 0 when every expert is always chosen."""
    if k >= clean_TE.shape[-1]:
        return clean_TE.new_zeros(())
    return cv_squared(smooth_load(clean_TE, noisy_TE, scale_TE, k, valid))


def switch_loss(
    probs_TE: Tensor,
    columns_TK: Tensor,
    valid: Tensor | None = None,
    absent_TK: Tensor | None = None,
    alike: int = 0,
) -> Tensor:
    """E · Σ fᵢ Pᵢ with fᵢ the share of assignments and Pᵢ the mean probability of expert i: 1 when balanced.

    Fedus et al. 2021 (Switch), https://arxiv.org/abs/2101.03961, equations 4 to 6; for K > 1 the shares are of all
    assignments. The gradient flows through P only. Each of the last `alike` columns counts with the mean share of them all
    (null experts: AdaMoE, Zeng et al. 2024, https://arxiv.org/abs/2406.13233).
    """
    tokens, n = probs_TE.shape
    k = columns_TK.shape[1]
    if valid is None:
        amount, probs_E = max(tokens, 1), probs_TE.sum(0)
        ones = probs_TE.new_ones(tokens * k)
    else:
        amount, probs_E = valid.sum().clamp(min=1), torch.where(valid.unsqueeze(1), probs_TE, 0.0).sum(0)
        ones = valid.to(probs_TE.dtype).repeat_interleave(k)
    assignments = amount * k
    if absent_TK is not None:  # routers that choose fewer than K
        ones = (~absent_TK).to(probs_TE.dtype).reshape(-1)
        assignments = ones.sum().clamp(min=1.0)
    counts_E = probs_TE.new_zeros(n).scatter_add(0, columns_TK.reshape(-1), ones)
    if alike:
        counts_E = torch.cat([counts_E[:-alike], counts_E[-alike:].mean().expand(alike)])
    return (counts_E * probs_E).sum() * n / (amount * assignments)


def z_loss(logits_TE: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the scores, which keeps them small (Zoph et al. 2022, ST-MoE, equation 5)."""
    return mean(logits_TE.logsumexp(-1).square(), valid)


def entropy_loss(logits_TE: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean entropy in nats of each token's distribution over experts: minimise it for decided routing."""
    log_probs_TE = logits_TE.log_softmax(-1)
    return mean(-(log_probs_TE.exp() * log_probs_TE).sum(-1), valid)


def mutual_information_loss(probs_TE: Tensor, task_T: Tensor, valid: Tensor | None = None) -> Tensor:
    """Minus the mutual information in nats of task label and expert over the batch (Mod-Squad, Chen et al. 2023).

    −Σ p(m, e) log(p(m, e) / (p(m) p(e))) with p(e | m) the mean probability of the task's tokens and p(m) the task's
    share of the batch: minimised by experts that belong to tasks and are all used. 0 for a batch of one task.
    """
    if valid is not None:
        keep = valid.nonzero().squeeze(1)
        probs_TE, task_T = probs_TE.index_select(0, keep), task_T.index_select(0, keep)
    if not len(probs_TE):
        return probs_TE.sum()
    labels, which_T = task_T.unique(return_inverse=True)
    joint_ME = probs_TE.new_zeros(len(labels), probs_TE.shape[1]).index_add(0, which_T, probs_TE) / len(probs_TE)
    independent_ME = joint_ME.sum(1, keepdim=True) * joint_ME.sum(0, keepdim=True)
    tiny = torch.finfo(probs_TE.dtype).tiny
    return -(joint_ME * (joint_ME.clamp(min=tiny) / independent_ME.clamp(min=tiny)).log()).sum()


def orthogonality_loss(vectors: list[Tensor]) -> Tensor:
    """Mean squared cosine between different rows of the stacked matrices (OMoE, Liu et al. 2023: Σ ⟨Wi, Wj⟩²).

    Rows of higher dimension are flattened. 0 for fewer than two rows.
    """
    rows = torch.cat([v.reshape(v.shape[0], -1) for v in vectors])
    n = rows.shape[0]
    if n < 2:
        return rows.sum() * 0.0
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    squares = (unit @ unit.T).square()
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


def consistency_loss(first: Tensor, second: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean symmetric Kullback-Leibler divergence in nats of two predictions of one input (THOR, Zuo et al. 2022).

    Args:
        first, second: logits (B, C) of two passes with different experts; −inf, in both, for outputs that are not meant.
        valid: (B,) which predictions count; None is all.
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    meant = p > -math.inf
    p, q = torch.where(meant, p, 0.0), torch.where(meant, q, 0.0)
    return mean(0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1), valid)


def mutual_distillation_loss(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of experts' outputs on the same token to their mean (MoDE, Xie et al. 2024).

    Args:
        outputs: (T, K, O) outputs of the experts that saw a token.
        mask: (T, K) which of them count.
    """
    if mask is None:
        return (outputs - outputs.mean(1, keepdim=True)).square().mean()
    weight = mask.to(outputs.dtype).unsqueeze(2)
    count = weight.sum(1, keepdim=True).clamp(min=1.0)
    mean = (outputs * weight).sum(1, keepdim=True) / count
    total = ((outputs - mean).square() * weight).sum()
    return total / (weight.sum() * outputs.shape[2]).clamp(min=1.0)
