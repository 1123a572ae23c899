"""Tokens that belong together: the sequences of a batch, however they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor


class Groups:
    """Which group each token is in, G groups numbered in the order of their sequence index.

    Args:
        sequence_T: index of each token's sequence, in any order and with gaps; None: each token is a group of its own.
        valid_T: False for padding, which is in its group and counts for nothing; None is all.
        like: (T, ...) for the number of tokens and the device.

    Attributes:
        count: G.
        of_T: the group of each token.
    """

    def __init__(self, sequence_T: Tensor | None, valid_T: Tensor | None, like: Tensor) -> None:
        self.tokens, self.device, self.valid_T = like.shape[0], like.device, valid_T
        if sequence_T is None:
            self.count, self.of_T = self.tokens, torch.arange(self.tokens, device=self.device)
        else:
            known_G, self.of_T = sequence_T.unique(return_inverse=True)
            self.count = len(known_G)

    def sizes(self) -> Tensor:
        """(G,) tokens without padding."""
        ones_T = torch.ones_like(self.of_T) if self.valid_T is None else self.valid_T.to(torch.int64)
        return torch.zeros(self.count, dtype=torch.int64, device=self.device).scatter_add(0, self.of_T, ones_T)

    def mean(self, x_TD: Tensor) -> Tensor:
        """(G, D) the mean token of each group, in the type of x; 0 where all is padding."""
        if self.valid_T is not None:  # where, not a product: a padded row may be anything
            x_TD = torch.where(self.valid_T.unsqueeze(1), x_TD, 0.0)
        total_GD = x_TD.new_zeros(self.count, x_TD.shape[1]).index_add(0, self.of_T, x_TD)
        return total_GD / self.sizes().clamp(min=1).unsqueeze(1).to(x_TD.dtype)

    def first(self) -> Tensor:
        """(G,) the first token of each group that is no padding, or the first one where all is padding."""
        place_T = torch.arange(self.tokens, device=self.device)
        if self.valid_T is not None:
            place_T = place_T + self.tokens * (~self.valid_T).to(torch.int64)
        empty_G = torch.full((self.count,), 2 * self.tokens, dtype=torch.int64, device=self.device)
        return empty_G.scatter_reduce(0, self.of_T, place_T, "amin") % max(self.tokens, 1)

    def padded(self) -> tuple[int, Tensor | None]:
        """The longest group's length L, and where each token is among the G · L places of a padded batch, in order.

        The latter is None when token t is at place t already.
        """
        if not self.tokens:
            return 0, None
        amount_G = torch.bincount(self.of_T, minlength=self.count)
        length = int(amount_G.max())
        if length * self.count == self.tokens and bool((self.of_T.diff() >= 0).all()):
            return length, None
        order_T = self.of_T.argsort(stable=True)
        start_G = amount_G.cumsum(0) - amount_G
        sorted_T = self.of_T.index_select(0, order_T)
        within_T = torch.arange(self.tokens, device=self.device) - start_G.index_select(0, sorted_T)
        place_T = torch.empty_like(order_T).index_copy(0, order_T, sorted_T * length + within_T)
        return length, place_T
