"""Two-level hierarchical routing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.moe.routers.parts import select
from cmoe.moe.routers.parts.scores import Grouped, Score
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


class TwoLevels(Grouped):
    """Log-probabilities of experts, of their group times that within it."""

    def __init__(self, dim: int, init_std: float, groups: int) -> None:
        super().__init__(dim, init_std)
        self.groups = groups

    def finish(self, scores_TE: Tensor) -> Tensor:
        own_TE, group_TE = scores_TE.unbind(2)
        runs = select.blocks(own_TE.shape[1], self.groups)
        group_TG = torch.stack([group_TE[:, a:b].mean(1) for a, b in runs], 1).log_softmax(-1)
        within = [own_TE[:, a:b].log_softmax(-1) + group_TG[:, g : g + 1] for g, (a, b) in enumerate(runs)]
        return torch.cat(within, 1)


@dataclass(eq=False, repr=False, kw_only=True)
class Hierarchical(Scored):
    """Two levels: a gate chooses groups of experts, a second one chooses within them; probabilities multiply.

    Jordan and Jacobs 1994; Shazeer et al. 2017, appendix B (https://arxiv.org/abs/1701.06538). A group's score is the
    mean of its experts' group scores, so that groups follow their experts as these come and go.

    Options:
        groups: groups of nearly equal size, in the order of the columns.
        k_groups: groups per token.
        k: experts per chosen group.
    """

    groups: PositiveInt = 4
    k_groups: PositiveInt = 1
    k: PositiveInt = 2
    switch: NonNegative = 0.01
    z: NonNegative = field(init=False, default=0.0)  # scores are log-probabilities: a sum of 1 is nothing to keep small

    def make_score(self) -> Score:
        return TwoLevels(self.dim, self.init_std, self.groups)

    def least(self) -> int:
        return self.k * self.k_groups

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        runs = select.blocks(scores_TE.shape[1], self.groups)
        # a group's log-probability is that of its experts together
        group_TG = torch.stack([scores_TE[:, a:b].logsumexp(1) for a, b in runs], 1)
        best, _ = select.top_k(group_TG, self.k_groups)
        k = min(self.k, min(b - a for a, b in runs))
        per_group = torch.stack([scores_TE[:, a:b].topk(k, dim=1).indices + a for a, b in runs], 1)
        chosen = per_group.gather(1, best.unsqueeze(2).expand(-1, -1, k))
        return chosen.flatten(1), None

    def experts_per_token(self, experts: ExpertView) -> int:
        runs = select.blocks(len(experts), self.groups)
        return min(self.k_groups, len(runs)) * min(self.k, min(b - a for a, b in runs))
