"""Which experts a token goes to: from scores (T, E) to columns (T, K), with a mask where fewer than K are meant."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

Selection = tuple[Tensor, Tensor | None]  # columns_TK, absent_TK (bool, True: nobody), None when all are meant


def top_k(scores_TE: Tensor, k: int) -> Selection:
    """The k highest, all of them when there are fewer."""
    n = scores_TE.shape[1]
    if scores_TE.device.type == "cpu" and (k, n) != (1, 0) and (k == 1 or (k == 2 and 2 < n <= 128)):
        return _one_by_one(scores_TE, k), None
    return scores_TE.topk(min(k, n), dim=-1).indices, None


def _one_by_one(scores_TE: Tensor, k: int) -> Tensor:
    """The best one or two of several: maxima are vectorised on CPU, `topk` is not."""
    first_T1 = scores_TE.max(1, keepdim=True).indices
    if k == 1:
        return first_T1
    second_T1 = scores_TE.detach().scatter(1, first_T1, -math.inf).max(1, keepdim=True).indices
    # where all others are -inf already, the first would be found again
    second_T1 = torch.where(second_T1 == first_T1, (first_T1 + 1) % scores_TE.shape[1], second_T1)
    return torch.cat([first_T1, second_T1], 1)


def everyone(scores_TE: Tensor) -> Selection:
    """Every expert."""
    tokens, n = scores_TE.shape
    return torch.arange(n, device=scores_TE.device).expand(tokens, n), None


def top_p(scores_TE: Tensor, p: float, most: int) -> Selection:
    """The fewest experts whose probabilities reach p together, at least one and at most `most` (0: no limit)."""
    n = scores_TE.shape[1]
    probs, columns_TE = scores_TE.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(-1) - probs  # what is reached without this expert
    absent_TE = before >= p
    absent_TE[:, :1] = False
    k = min(most or n, n)
    if not most and scores_TE.shape[0]:
        k = max(1, int((~absent_TE).sum(1).max()))
    return columns_TE[:, :k], absent_TE[:, :k]


def positive(scores_TE: Tensor, floor: Tensor | float = 0.0, at_least_one: bool = False) -> Selection:
    """All experts with a score above `floor` (a number, or one per expert), possibly none."""
    margin_TE = scores_TE - floor
    k = int((margin_TE > 0).sum(1).max()) if scores_TE.numel() else 1
    values_TK, columns_TK = margin_TE.topk(max(k, 1), dim=-1)
    absent_TK = values_TK <= 0
    if at_least_one:
        absent_TK[:, 0] = False
    return columns_TK, absent_TK


def not_drawn(scores_TE: Tensor, columns_TK: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Which second choices do not work: each does with probability 2·g₂ (GShard); None where there is no second.

    g₂ is the second gate after both were normed to a sum of 1, as in the paper's Algorithm 1: two equal gates always work
    together. (The port of NLLB in transformers draws by the gate among all experts.)
    """
    if columns_TK.shape[1] < 2:
        return None
    second_T = scores_TE.gather(1, columns_TK).softmax(-1)[:, 1]
    drawn_T = torch.rand(second_T.shape, device=second_T.device, generator=generator)
    absent_TK = torch.zeros_like(columns_TK, dtype=torch.bool)
    absent_TK[:, 1] = drawn_T >= 2 * second_T
    return absent_TK


def blocks(n: int, groups: int) -> list[tuple[int, int]]:
    """`n` columns in `groups` runs of nearly equal length, as (start, stop); fewer groups than columns at most."""
    groups = min(groups, n)
    edges = [n * g // groups for g in range(groups + 1)]
    return list(pairwise(edges))


def best_of_each(scores_TE: Tensor, groups: int) -> Selection:
    """The highest of each group of columns."""
    parts = [scores_TE[:, a:b].argmax(1) + a for a, b in blocks(scores_TE.shape[1], groups)]
    return torch.stack(parts, 1), None


def by_experts(scores_TE: Tensor, each: int) -> Selection:
    """Every expert takes its `each` highest tokens (expert choice); a token may get any number of experts."""
    tokens, n = scores_TE.shape
    if not tokens:
        return scores_TE.new_zeros(0, 1, dtype=torch.int64), None
    rows_CE = scores_TE.topk(min(each, tokens), dim=0).indices
    taken_TE = torch.zeros(tokens, n, dtype=torch.bool, device=scores_TE.device).scatter(0, rows_CE, True)
    k = max(1, int(taken_TE.sum(1).max()))
    marked = taken_TE.to(torch.int64) * n - torch.arange(n, device=scores_TE.device)  # taken first, in column order
    columns_TK = marked.topk(k, dim=1).indices
    return columns_TK, ~taken_TE.gather(1, columns_TK)


@torch.no_grad()
def sinkhorn(scores_TE: Tensor, iterations: int, tolerance: float = 1e-4) -> Tensor:
    """The doubly balanced plan (T, E) nearest to softmax(scores): rows sum to 1, columns to T/E."""
    tokens, n = scores_TE.shape
    if not tokens:
        return scores_TE
    log_plan = scores_TE - scores_TE.max()
    share = math.log(tokens / n)
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + share
        before = log_plan
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        if (log_plan - before).abs().max() < tolerance:
            break
    return log_plan.exp()


@torch.no_grad()
def auction(scores_TE: Tensor, epsilon: float = 1e-3, most: int = 500) -> Tensor:
    """The assignment (T,) of tokens to experts with the highest sum of scores, each expert at most ⌈T/E⌉ tokens.

    Bertsekas's auction: free tokens bid for their best expert what it is worth above the second best; an expert keeps
    its highest bidders. Within T·epsilon·range of the optimum; what is still free after `most` rounds goes where there
    is room.
    """
    tokens, n = scores_TE.shape
    device = scores_TE.device
    room = -(-tokens // n) if tokens else 0
    owner_T = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    if not tokens or n == 1:
        return owner_T.clamp(min=0)
    worth = scores_TE.double()
    step = epsilon * float((worth.max() - worth.min()).clamp(min=1e-12))
    price_E = worth.new_zeros(n)
    bid_T = worth.new_full((tokens,), -math.inf)
    for _ in range(most):
        free = (owner_T < 0).nonzero().squeeze(1)
        if not len(free):
            break
        best = (worth[free] - price_E).topk(2, dim=1)
        wanted = best.indices[:, 0]
        bid_T[free] = price_E[wanted] + best.values[:, 0] - best.values[:, 1] + step
        owner_T[free] = wanted
        for e in wanted.unique().tolist():
            mine = (owner_T == e).nonzero().squeeze(1)
            if len(mine) >= room:
                order = bid_T[mine].argsort(descending=True, stable=True)
                owner_T[mine[order[room:]]] = -1
                price_E[e] = bid_T[mine[order[room - 1]]]
    for t in (owner_T < 0).nonzero().squeeze(1).tolist():
        counts = torch.bincount(owner_T[owner_T >= 0], minlength=n)
        owner_T[t] = worth[t].masked_fill(counts >= room, -math.inf).argmax()
    return owner_T
