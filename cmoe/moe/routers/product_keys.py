"""Product keys: the best of very many experts without a score for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import Count, PositiveInt
from cmoe.moe.routers.parts.scores import product
from cmoe.moe.routers.sparse import Sparse
from cmoe.moe.routing import RouteContext, Routing, replayed
from cmoe.moe.view import NONE, Columns, ExpertView

if TYPE_CHECKING:
    from cmoe.moe.optimizer import ParameterChange

AT_ONCE = 2**24  # candidates that are scored at once


class Grid(nn.Module):
    """The keys of a cohort: experts stand on a grid of two sets of sub-keys, and an expert's key is a pair of them.

    A cohort of n experts has about 2√n sub-keys. A part of a cohort takes all of them along with the places of its own
    experts: keys cannot be divided, but both parts go on with what they had.

    Attributes:
        first, second: sub-keys of the grid's rows and of its columns, (A, Q) and (B, Q).
        place: (n,) where each expert stands: row · B + column.
        whole: whether expert e stands at place e and no place is empty.

    Args:
        n: experts.
        size: Q, dimensions of a sub-key.
    """

    place: Tensor

    def __init__(self, n: int, size: int) -> None:
        super().__init__()
        self.n = n
        rows, across = shape_for(n)
        self.first = nn.Parameter(torch.zeros(rows, size))
        self.second = nn.Parameter(torch.zeros(across, size))
        self.register_buffer("place", torch.arange(n))
        self.whole = n == rows * across

    def taken(self, rows: Sequence[int], change: ParameterChange) -> Grid:
        """A copy for these experts alone; `change` learns where its parameters come from."""
        part = Grid(len(rows), self.first.shape[1])
        for name in ("first", "second"):
            old = self.get_parameter(name)
            new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            setattr(part, name, new)
            change.sources[new] = [(old, tuple(range(len(old))))]
        part.place = self.place.index_select(0, torch.tensor(rows, dtype=torch.int64, device=self.place.device))
        part.whole = False
        return part.train(self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # a part of a cohort has more keys than a cohort of its size is made with
        for name in ("first", "second"):
            own, saved = self.get_parameter(name), state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape != own.shape and saved.shape[1:] == own.shape[1:]:
                own.data = own.data.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        everyone = torch.arange(len(self.first) * len(self.second), device=self.place.device)
        self.whole = torch.equal(self.place, everyone)


def shape_for(n: int) -> tuple[int, int]:
    """Rows and columns of a nearly square grid for n experts, without an empty place where n allows it."""
    root = math.isqrt(n)
    for rows in range(root, (root + 1) // 2, -1):
        if n % rows == 0:
            return rows, n // rows
    across = root if root * root == n else root + 1
    return -(-n // across), across


@torch.no_grad()
def best_pairs(first_NA: Tensor, second_NB: Tensor, k: int, place_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k highest sums of one score of each set and their places row · B + column, both (N, k); exact.

    Of the pairs of ranks in their sets, (i, j) has (i+1)·(j+1) − 1 others that are at least as high: only where this
    product is at most k can a pair be among the best. Each place without an expert makes one candidate more necessary.

    Args:
        first_NA, second_NB: scores of the sub-keys.
        k: how many; at most as many as there are experts.
        place_E: the places that have an expert; None is all.
    """
    rows, across = first_NA.shape[1], second_NB.shape[1]
    wanted = k if place_E is None else k + rows * across - len(place_E)
    best_a, best_b = first_NA.topk(min(wanted, rows), dim=1), second_NB.topk(min(wanted, across), dim=1)
    ranks_a, ranks_b = (torch.arange(1, r.shape[1] + 1, device=r.device) for r in (best_a.indices, best_b.indices))
    rank_a, rank_b = (ranks_a.unsqueeze(1) * ranks_b <= wanted).nonzero().unbind(1)
    empty = None
    if place_E is not None:
        empty = torch.ones(rows * across, dtype=torch.bool, device=first_NA.device).index_fill(0, place_E, False)
    found: list[tuple[Tensor, Tensor]] = []
    step = max(1, AT_ONCE // len(rank_a))
    for start in range(0, max(len(first_NA), 1), step):
        part = slice(start, start + step)
        sum_NC = best_a.values[part].index_select(1, rank_a) + best_b.values[part].index_select(1, rank_b)
        place_NC = best_a.indices[part].index_select(1, rank_a) * across + best_b.indices[part].index_select(1, rank_b)
        if empty is not None:
            sum_NC = sum_NC.masked_fill(empty.index_select(0, place_NC.flatten()).view_as(place_NC), -math.inf)
        best = sum_NC.topk(k, dim=1)
        found.append((best.values, place_NC.gather(1, best.indices)))
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


@dataclass(eq=False, repr=False, kw_only=True)
class ProductKeys(Sparse):
    """Product keys: each token retrieves its best experts of very many by keys that are pairs of sub-keys.

    He 2024 (PEER, mixture of a million experts), https://arxiv.org/abs/2407.04153; Lample et al. 2019,
    https://arxiv.org/abs/1907.05242. Several heads ask, each with a query of its own in two halves; an expert's score is
    the sum of its sub-keys' products with the halves, and the best k of n experts are found among the best k of about √n
    on each side. Weights are a softmax for each head, added up where two heads find the same expert: their sum is the
    number of heads. Each cohort has a grid of its own; n that is a square, or a product of two similar numbers, is
    quickest, and experts that are removed or may not be seen slow the search down. Tiny experts are meant: `expert:
    {name: ffn, bias: false}` with `hidden: 1`.

    Options:
        k: experts that each head finds.
        heads: how many queries a token has.
        rank: dimensions of a sub-key; 0 is half of the input's.
        norm: 'layer' norms each half of a query, so that keys are found evenly ('none' does not); a batch norm, as in the
            paper, would let tokens see each other.
    """

    k: PositiveInt = 16
    heads: PositiveInt = 8
    rank: Count = 0
    norm: Literal["layer", "none"] = "layer"

    exact_k = False  # two heads may find the same expert

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = self.rank or max(self.dim // 2, 1)
        if self.norm == "layer" and self.size < 2:
            raise ValueError(f"product_keys: rank: expected at least 2 with norm: layer, got {self.size}")
        self.query = nn.Linear(self.dim, self.heads * 2 * self.size, bias=False)
        self.exact_k = self.heads == 1

    def check(self) -> None:
        super().check()
        if self.norm not in ("layer", "none"):
            raise ValueError(f"product_keys: norm: expected 'layer' or 'none', got {self.norm!r}")

    def new_columns(self, n: int) -> nn.Module:
        return Grid(n, self.size)

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        for keys in columns.parameters():
            keys.normal_(0.0, 1.0 / math.sqrt(self.size))

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.heads * self.k, len(experts))

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        tokens = len(x_TD)
        query_NQ = product(x_TD, self.query.weight).view(tokens * self.heads, 2 * self.size)
        half_N2Q = query_NQ.view(-1, 2, self.size)
        if self.norm == "layer":
            half_N2Q = F.layer_norm(half_N2Q, (self.size,))
        search = Search(half_N2Q, [(self._grid(key), rows) for key, rows in columns.parts])
        if context.replay is None:
            columns_TK, weights_TK = self._retrieved(search, columns, tokens)
            absent_TK = columns_TK < 0
        else:
            columns_TK, absent_TK, left_TK = replayed(context.replay, columns)
            absent_TK = absent_TK | left_TK  # this router leaves out nobody itself
            weights_TK = self._weighed(search, columns_TK, absent_TK)
        if context.valid is not None:
            absent_TK = absent_TK | ~context.valid.unsqueeze(1)
        ids_TK = columns.to_ids(columns_TK.clamp(min=0)).masked_fill(absent_TK, NONE)
        weights_TK = weights_TK.masked_fill(absent_TK, 0.0)
        return Routing(ids=ids_TK, weights=weights_TK, columns=columns.ids, valid=context.valid)

    def flops_per_token(self) -> int:
        # every head compares its own query with all keys
        return 2 * (self.query.weight.numel() + self.heads * sum(keys.numel() for keys in self.columns.parameters()))

    def _grid(self, key: str) -> Grid:
        found = self.columns[key]
        assert isinstance(found, Grid)
        return found

    def _retrieved(self, search: Search, columns: Columns, tokens: int) -> tuple[Tensor, Tensor]:
        """The experts that a token's heads find, each once with −1 behind them, and their weights, (T, heads · k)."""
        k = min(self.k, len(columns))
        columns_NK = search.best(k)
        weights_TK = search.scores(columns_NK).softmax(1).view(tokens, self.heads * k)
        columns_TK = columns_NK.view(tokens, self.heads * k)
        return (columns_TK, weights_TK) if self.heads == 1 else joined(columns_TK, weights_TK)

    def _weighed(self, search: Search, columns_TK: Tensor, absent_TK: Tensor) -> Tensor:
        """The weights of given experts: each head takes its best k of them, which are those that it once found."""
        tokens, width = columns_TK.shape
        absent_NK = absent_TK.repeat_interleave(self.heads, 0)
        scores_NK = search.scores(columns_TK.repeat_interleave(self.heads, 0))
        lowest = torch.finfo(scores_NK.dtype).min  # finite, so that a token of nobody has no NaN
        scores_NK = scores_NK.masked_fill(absent_NK, lowest)
        best_NK = scores_NK.topk(min(self.k, width), dim=1).indices
        others_NK = torch.ones_like(absent_NK).scatter(1, best_NK, False)
        weights_NK = scores_NK.masked_fill(others_NK, lowest).softmax(1)
        return weights_NK.view(tokens, self.heads, width).sum(1)


class Search:
    """The queries of a batch against the keys of all visible experts.

    Args:
        half_N2Q: both halves of each head's query, N = tokens · heads.
        grids: the cohorts' grids in column order, with the visible rows (None: all).
    """

    def __init__(self, half_N2Q: Tensor, grids: list[tuple[Grid, tuple[int, ...] | None]]) -> None:
        self.first = [product(half_N2Q[:, 0], grid.first) for grid, _ in grids]
        self.second = [product(half_N2Q[:, 1], grid.second) for grid, _ in grids]
        self.places: list[Tensor | None] = []  # of a grid's visible experts; None where place e is expert e
        self.counts: list[int] = []
        for grid, rows in grids:
            place_E = grid.place
            if rows is not None:
                place_E = place_E.index_select(0, torch.tensor(rows, dtype=torch.int64, device=place_E.device))
            self.places.append(None if grid.whole and rows is None else place_E)
            self.counts.append(len(place_E))
        self.device = half_N2Q.device

    def best(self, k: int) -> Tensor:
        """(N, k) columns of the k experts with the highest scores; k is at most the number of experts."""
        values, columns, start = [], [], 0
        for first_NA, second_NB, place_E, count in zip(self.first, self.second, self.places, self.counts, strict=True):
            value_NK, place_NK = best_pairs(first_NA, second_NB, min(k, count), place_E)
            if place_E is not None:
                number_P = place_E.new_zeros(first_NA.shape[1] * second_NB.shape[1])
                number_P = number_P.index_copy(0, place_E, torch.arange(count, device=self.device))
                place_NK = number_P.index_select(0, place_NK.flatten()).view_as(place_NK)
            values.append(value_NK)
            columns.append(place_NK + start)
            start += count
        if len(columns) == 1:
            return columns[0]
        return torch.cat(columns, 1).gather(1, torch.cat(values, 1).topk(k, dim=1).indices)

    def scores(self, columns_NK: Tensor) -> Tensor:
        """(N, k) each query's score of the given experts."""
        if len(self.places) == 1 and self.places[0] is None:
            across = self.second[0].shape[1]
            row_NK, across_NK = columns_NK.div(across, rounding_mode="floor"), columns_NK % across
        else:
            rows, columns, row, column = [], [], 0, 0
            for first_NA, second_NB, place_E, count in zip(
                self.first, self.second, self.places, self.counts, strict=True
            ):
                place_E = torch.arange(count, device=self.device) if place_E is None else place_E
                rows.append(place_E.div(second_NB.shape[1], rounding_mode="floor") + row)
                columns.append(place_E % second_NB.shape[1] + column)
                row, column = row + first_NA.shape[1], column + second_NB.shape[1]
            row_NK, across_NK = (
                torch.cat(of_E).index_select(0, columns_NK.flatten()).view_as(columns_NK) for of_E in (rows, columns)
            )
        return torch.cat(self.first, 1).gather(1, row_NK) + torch.cat(self.second, 1).gather(1, across_NK)


def joined(columns_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Each column once, with the sum of its weights; −1 and 0 behind them."""
    sorted_TK, order_TK = columns_TK.sort(dim=1)
    new_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    new_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    place_TK = new_TK.cumsum(1) - 1
    once_TK = torch.full_like(sorted_TK, NONE).scatter(1, place_TK, sorted_TK)
    return once_TK, torch.zeros_like(weights_TK).scatter_add(1, place_TK, weights_TK.gather(1, order_TK))
