"""Mixture-of-Depths: in each sequence a few tokens go through a module, the others pass it by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe import losses
from cmoe.moe.routers.parts.scores import product

Call = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Depths:
    """Which tokens went through the module.

    Attributes:
        chosen: (B, L) bool.
        scores: (B, L) the router's, by which the module's output is weighted; float32, or float64 for such inputs.
        aux: auxiliary losses by name, already weighted; empty outside training.
    """

    chosen: Tensor
    scores: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


class MixtureOfDepths(nn.Module):
    """Any module on sequences (B, L, D), for the tokens of each sequence that need it most.

    Raposo et al. 2024, https://arxiv.org/abs/2404.02258: the ⌈capacity · L⌉ tokens with the highest scores x · w go through
    it together, in their order, and get x + score · f(x); all others stay as they are. What is left out costs nothing.

    A choice of the highest looks at later tokens. In a decoder (`causal`) that is so while training only: a small predictor
    learns, from the token alone and without shaping anything else, whether it is among the chosen, and outside training
    decides. Then the number of chosen tokens is only about the capacity.

        block = MixtureOfDepths(Block(64), 64, capacity=0.125, causal=True)
        y, depths = block(x)                            # x (B, L, 64)
        loss = task_loss(y) + sum(depths.aux.values())

    Args:
        module: (B, M, D) to (B, M, D), on M ≤ L tokens. Where sequences have different numbers of chosen tokens, zeros
            stand behind the shorter ones: a module in which tokens see each other should be causal, or is told by
            `call` which these are.
        dim: D.
        capacity: share of the tokens of a sequence that go through, above 0 and at most 1.
        causal: whether to decide by the predictor outside training.
        adds: whether the module adds its own input, as a whole transformer block does; then f(x) is what it adds.
        predictor: weight of the predictor's loss, a cross-entropy.
        hidden: units of the predictor; default D/4.

    Raises:
        ValueError: `capacity` is out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        dim: int,
        capacity: float = 0.125,
        *,
        causal: bool = False,
        adds: bool = False,
        predictor: float = 0.1,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity: expected above 0 and at most 1, got {capacity}")
        self.module, self.dim, self.capacity, self.adds, self.weight = module, dim, capacity, adds, predictor
        self.router = nn.Linear(dim, 1, bias=False)
        self.predictor = Predictor(dim, hidden or max(dim // 4, 1)) if causal else None

    def forward(self, x_BLD: Tensor, valid: Tensor | None = None, call: Call | None = None) -> tuple[Tensor, Depths]:
        """Send the chosen tokens through the module.

        Args:
            x_BLD: sequences.
            valid: (B, L) bool, False for padding, which is never chosen and counts for no capacity.
            call: runs the module on chosen tokens (B, M, D) with their places (B, M), where it needs to know them; −1 is
                nobody. Default is the module alone.

        Returns:
            y (B, L, D), and which tokens were chosen.
        """
        seen_BLD = x_BLD if valid is None else torch.where(valid.unsqueeze(2), x_BLD, 0.0)  # padding may be anything
        with torch.autocast(x_BLD.device.type, enabled=False):
            score_BL = product(seen_BLD, self.router.weight).squeeze(2)
            foreseen_BL = None if self.predictor is None else self.predictor(seen_BLD.detach())
        if foreseen_BL is not None and not self.training:
            chosen_BL = foreseen_BL > 0
            chosen_BL = chosen_BL if valid is None else chosen_BL & valid
        else:
            chosen_BL = self._highest(score_BL.detach(), valid)
        count_B = chosen_BL.sum(1)
        most = int(count_B.max()) if len(count_B) else 0
        depths = Depths(chosen_BL, score_BL)
        if foreseen_BL is not None and self.training:
            each_BL = F.binary_cross_entropy_with_logits(foreseen_BL, chosen_BL.to(foreseen_BL.dtype), reduction="none")
            padding = None if valid is None else valid.flatten()
            depths.aux["depth"] = self.weight * losses.mean(each_BL.flatten(), padding)
        if not most:
            return x_BLD, depths
        # the chosen ones in their order, then some of the others, whose outputs nobody gets
        place_BM = (~chosen_BL).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        absent_BM = torch.arange(most, device=x_BLD.device) >= count_B.unsqueeze(1)
        index_BMD = place_BM.unsqueeze(2).expand(-1, -1, x_BLD.shape[2])
        picked_BMD = x_BLD.gather(1, index_BMD).masked_fill(absent_BM.unsqueeze(2), 0.0)
        out_BMD = self.module(picked_BMD) if call is None else call(picked_BMD, place_BM.masked_fill(absent_BM, -1))
        added_BMD = out_BMD - picked_BMD if self.adds else out_BMD
        weight_BM1 = score_BL.gather(1, place_BM).unsqueeze(2).to(added_BMD.dtype)
        added_BMD = (added_BMD * weight_BM1).masked_fill(absent_BM.unsqueeze(2), 0.0)
        return x_BLD + torch.zeros_like(x_BLD).scatter(1, index_BMD, added_BMD.to(x_BLD.dtype)), depths

    def _highest(self, score_BL: Tensor, valid: Tensor | None) -> Tensor:
        """The tokens with the highest scores of each sequence, (B, L) bool, as many as the capacity says."""
        length = score_BL.shape[1]
        if valid is None:
            top_BM = score_BL.topk(places(self.capacity, length), dim=1).indices
            return torch.zeros_like(score_BL, dtype=torch.bool).scatter(1, top_BM, True)
        places_B = torch.tensor([places(self.capacity, n) for n in valid.sum(1).tolist()], device=valid.device)
        order_BL = score_BL.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
        rank_L = torch.arange(length, device=valid.device)
        return torch.zeros_like(valid).scatter(1, order_BL, rank_L < places_B.unsqueeze(1))


class Predictor(nn.Module):
    """Whether a token will be among the chosen, as a logit; knows nothing but the token (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(product(x, self.first.weight, self.first.bias))
        return product(hidden, self.second.weight, self.second.bias).squeeze(-1)


def places(capacity: float, length: int) -> int:
    """⌈capacity · length⌉; a product that should be whole is not rounded up."""
    return min(length, math.ceil(capacity * length - 1e-9))
