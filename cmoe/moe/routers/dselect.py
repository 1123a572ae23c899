"""DSelect-k: a choice of experts that is sparse and differentiable at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cmoe.config.types import NonNegative, Positive, PositiveInt
from cmoe.moe import losses
from cmoe.moe.routers.parts import select
from cmoe.moe.routers.parts.scores import Score, checked_label, exact, product
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routing import RouteContext, Routing
from cmoe.moe.view import Columns, ExpertView


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """0 below −γ/2, 1 above γ/2, and −2z³/γ³ + 3z/(2γ) + ½ between: differentiable everywhere."""
    t = (z / gamma).clamp(-0.5, 0.5)
    return torch.where(t <= -0.5, 0.0, torch.where(t >= 0.5, 1.0, (1.5 - 2.0 * t * t) * t + 0.5))


class Selectors(Score):
    """k gates over the binary digits of an expert's id, and how much each counts; nothing belongs to one expert."""

    def __init__(self, dim: int, k: int, gate: str, gamma: float, bits: int, tasks: int) -> None:
        super().__init__(dim)
        self.k, self.gate, self.gamma, self.bits, self.tasks = k, gate, gamma, bits, tasks
        inputs = {"token": dim, "static": 1, "task": tasks}[gate]
        self.digits = nn.Parameter(torch.empty(k, bits, inputs).uniform_(-gamma / 100, gamma / 100))
        self.shares = nn.Parameter(torch.empty(k, inputs).uniform_(-0.05, 0.05))
        if gate == "token":
            self.digit_bias = nn.Parameter(torch.empty(k, bits).uniform_(-gamma / 100, gamma / 100))
            self.share_bias = nn.Parameter(torch.empty(k).uniform_(-0.05, 0.05))

    def new_columns(self, n: int) -> None:
        return None

    def reset_columns(self, columns: Any) -> None:
        pass

    def active(self, rows: Sequence[nn.Module]) -> int:
        return super().active(rows) // (self.tasks if self.gate == "task" else 1)  # one task's

    def both(self, x_TD: Tensor, context: RouteContext, columns: Columns) -> tuple[Tensor, Tensor]:
        """Each selector's distribution over experts (T, k, E), and how much it counts (T, k); T is 1 where all tokens
        have the same."""
        used, code = self._codes(columns, x_TD.device)
        digits = self.digits.index_select(1, used)
        if self.gate == "token":
            bias = self.digit_bias.index_select(1, used)
            digit_TKM = product(x_TD, digits.flatten(0, 1), bias.flatten()).view(len(x_TD), self.k, len(used))
            share_TK = product(x_TD, self.shares, self.share_bias)
        else:
            label = torch.zeros(1, dtype=torch.int64, device=x_TD.device)
            if self.gate == "task":
                label = torch.as_tensor(checked_label("dselect_k", context.task, self.tasks), device=x_TD.device).view(
                    -1
                )
            digit_TKM = exact(digits.index_select(2, label).permute(2, 0, 1))
            share_TK = exact(self.shares.index_select(1, label).t())
        step_TKM = smooth_step(digit_TKM, self.gamma)
        choice_TKE = step_TKM.new_ones(*step_TKM.shape[:2], len(columns))
        code = code.to(step_TKM.dtype)
        for digit in range(len(used)):  # one by one: the backward pass of a product over a dimension dislikes zeros
            constant_E, slope_E = code[0, digit], code[1, digit]
            choice_TKE = choice_TKE * (constant_E + slope_E * step_TKM[:, :, digit, None])
        return choice_TKE, share_TK.softmax(1)

    def _codes(self, columns: Columns, device: torch.device) -> tuple[Tensor, Tensor]:
        """The digits that tell these experts apart (M,), and (2, M, E): an expert's factor is the first of the two plus
        the second times the digit's step.

        From the highest digit down, a digit decides only where experts with both of its values are left: a selector's
        distribution sums to 1 whatever ids there are, and its factors for 2^M experts are those of the paper.
        """

        def used() -> Tensor:
            return torch.tensor(deciding_digits(columns.ids, self.bits), dtype=torch.int64)

        def factors() -> Tensor:
            table = []
            for digit in deciding_digits(columns.ids, self.bits):
                decided = {expert >> digit for expert in columns.ids}
                table.append([
                    ((0, 1) if expert >> digit & 1 else (1, -1)) if expert >> digit ^ 1 in decided else (1, 0)
                    for expert in columns.ids
                ])  # fmt: skip
            return torch.tensor(table, dtype=torch.int8).view(len(table), len(columns), 2).permute(2, 0, 1)

        own = f"dselect {self.bits}"
        return columns.cached(f"{own} used", device, used), columns.cached(f"{own} factors", device, factors)


def deciding_digits(ids: tuple[int, ...], bits: int) -> list[int]:
    """The binary digits, the highest first, in which two of these ids differ that agree in all higher ones.

    Raises:
        ValueError: an id has more than `bits` digits.
    """
    if max(ids) >= 2**bits:
        raise ValueError(
            f"dselect_k: bits: expected at least {max(ids).bit_length()} for expert {max(ids)}, got {bits}"
        )
    prefixes = [{expert >> digit for expert in ids} for digit in range(bits)]
    return [d for d in reversed(range(bits)) if any(prefix ^ 1 in prefixes[d] for prefix in prefixes[d])]


@dataclass(eq=False, repr=False, kw_only=True)
class DSelectK(Scored):
    """DSelect-k: k selectors, each of which settles on one expert; sparse in the end and differentiable all the time.

    Hazimeh et al. 2021, https://arxiv.org/abs/2106.03760. An expert's code are the binary digits of its id; a selector
    has a smooth step for each digit and gives an expert the product over its code. At first every expert works on every
    token; what has a weight of exactly 0 is left out. Any number of experts will do: where ids leave codes without an
    expert, a digit that has only one value left decides nothing (the paper's code adds a loss against such codes).

    Options:
        k: selectors: experts per token at most, once they are decided.
        gate: what decides: the 'token'; nothing, so that all tokens have the same experts ('static'); or the label of
            the 'task'.
        gamma: γ, the width of the smooth step: the smaller, the sooner a selector decides.
        bits: digits of a code; ids of experts must be below 2 to this power.
        tasks: how many task labels there may be with gate 'task'.
        entropy: weight of the selectors' mean entropies, which makes them decide.
    """

    k: PositiveInt = 2
    gate: Literal["token", "static", "task"] = "token"
    gamma: Positive = 1.0
    bits: PositiveInt = 16
    tasks: PositiveInt = 16
    entropy: NonNegative = 0.01
    z: NonNegative = field(init=False, default=0.0)  # a sum of 1 is nothing to keep small
    orthogonality: NonNegative = field(init=False, default=0.0)
    init_std: NonNegative = field(init=False, default=0.02)

    exact_k = False
    fixed_k = False
    needs_with: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "restrict": {"task": ("task",)},
        "level": {"sequence": ("sequence",)},
        "gate": {"task": ("task",)},
    }

    def check(self) -> None:
        super().check()
        if self.gate not in ("token", "static", "task"):
            raise ValueError(f"dselect_k: gate: expected one of ('token', 'static', 'task'), got {self.gate!r}")

    def least(self) -> int:
        return 1

    def make_score(self) -> Score:
        return Selectors(self.dim, self.k, self.gate, self.gamma, self.bits, self.tasks)

    def _scores(self, x_TD: Tensor, context: RouteContext, columns: Columns) -> tuple[Tensor, Any]:
        assert isinstance(self.score, Selectors)
        self._choice_TKE, share_TK = self.score.both(x_TD, context, columns)
        weight_TE = torch.einsum("tk,tke->te", share_TK, self._choice_TKE)
        scores_TE = weight_TE.clamp(min=torch.finfo(weight_TE.dtype).tiny).log()
        return scores_TE.expand(len(x_TD), -1), None

    def _route(self, x_TD: Tensor, context: RouteContext, columns: Columns, training: bool) -> Routing:
        try:
            return super()._route(x_TD, context, columns, training)
        finally:
            self._choice_TKE = None  # was for `mean_entropy`

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        # a weight of 0 is at log(tiny); with a margin, since logarithms may differ in the last bit
        return select.positive(scores_TE, 0.999 * math.log(torch.finfo(scores_TE.dtype).tiny))

    def mean_entropy(self, scores_TE: Tensor, valid: Tensor | None) -> Tensor:
        """Of each selector's distribution over experts, summed over the selectors."""
        assert self._choice_TKE is not None
        choice_TKE = self._choice_TKE.expand(len(scores_TE), -1, -1)
        # clamped, as the slope at 0 is infinite
        entropy_T = torch.special.entr(choice_TKE.clamp(min=1e-12)).sum((1, 2))
        return losses.mean(entropy_T, valid)

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))
