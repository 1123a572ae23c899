"""The field's routers that are combinations of parts: what each scores, selects and weighs, with its paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cmoe.config.types import Count, NonNegative, Positive, PositiveInt, Probability
from cmoe.moe import losses
from cmoe.moe.routers.parts import scores, select, weigh
from cmoe.moe.routers.parts.scores import Score
from cmoe.moe.routers.parts.select import Selection
from cmoe.moe.routers.scored import Scored
from cmoe.moe.routers.topk import TopK
from cmoe.moe.routing import RouteContext
from cmoe.moe.view import Columns, ExpertView


@dataclass(eq=False, repr=False, kw_only=True)
class Dense(Scored):
    """Dense softmax: every expert works on every token, weighted by its probability.

    Jacobs, Jordan, Nowlan and Hinton 1991, Adaptive mixtures of local experts.
    """

    switch: NonNegative = field(init=False, default=0.0)  # everyone has the same load

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.everyone(scores_TE)

    def experts_per_token(self, experts: ExpertView) -> int:
        return len(experts)


@dataclass(eq=False, repr=False, kw_only=True)
class NoisyTopK(TopK):
    """Noisy top-k with importance and load losses.

    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.
    """

    noise: Literal["none", "shazeer", "gaussian", "jitter"] = "shazeer"
    importance: NonNegative = 0.1
    load: NonNegative = 0.1
    switch: NonNegative = 0.0


@dataclass(eq=False, repr=False, kw_only=True)
class Switch(TopK):
    """Switch: one expert per token, weighted by its probability, with jitter, a capacity and the load balance loss.

    Fedus, Zoph and Shazeer 2021, https://arxiv.org/abs/2101.03961.
    """

    k: PositiveInt = 1
    order: Literal["before", "after"] = "after"
    noise: Literal["none", "shazeer", "gaussian", "jitter"] = "jitter"
    capacity: NonNegative = 1.25


@dataclass(eq=False, repr=False, kw_only=True)
class GShard(Scored):
    """GShard: the best expert and, with probability twice its gate, the second best; the two gates sum to 1.

    Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668. Outside training the second always works. Places are given token
    by token, both choices of one before the next, and not all first choices before any second as in the paper.
    """

    switch: NonNegative = 0.01
    capacity: NonNegative = 1.0

    exact_k = False

    def least(self) -> int:
        return 2

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.top_k(scores_TE, 2)

    def leave_out(self, scores_TE: Tensor, columns_TK: Tensor, context: RouteContext) -> Tensor | None:
        # the first keeps its normed gate where the second is not drawn
        return select.not_drawn(scores_TE, columns_TK, context.generator)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.softmax_chosen(scores_TE, columns_TK, absent_TK)

    def extra_losses(
        self,
        scores_TE: Tensor,
        chosen_TE: Tensor,
        scale_TE: Tensor | None,
        columns_TK: Tensor,
        context: RouteContext,
    ) -> dict[str, Tensor]:
        if not self.switch:
            return {}
        # the paper counts first choices only; the best is the first whatever is replayed
        first_T1 = scores_TE.argmax(1, keepdim=True)
        return {"switch": self.switch * losses.switch_loss(scores_TE.softmax(-1), first_T1, context.valid)}

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(2, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class Prototypes(Scored):
    """Expert prototyping: the experts stand in k groups, and a token goes to the best of each group.

    Yang et al. 2021 (M6-T), https://arxiv.org/abs/2105.15082. Weights are the probabilities within the groups, over k.

    Options:
        groups: k, groups of nearly equal size in the order of the columns; with fewer experts one group for each.
    """

    groups: PositiveInt = 2
    switch: NonNegative = 0.01

    def least(self) -> int:
        return self.groups

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.best_of_each(scores_TE, self.groups)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        parts = [scores_TE[:, a:b].softmax(-1) for a, b in select.blocks(scores_TE.shape[1], self.groups)]
        weights_TK = torch.cat(parts, 1).gather(1, columns_TK) / columns_TK.shape[1]
        return weights_TK if absent_TK is None else weights_TK.masked_fill(absent_TK, 0.0)

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.groups, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class Cosine(TopK):
    """Cosine router: cosine similarity in a low-dimensional space over a learned temperature, on top-k.

    Chi et al. 2022 (X-MoE), https://arxiv.org/abs/2204.09179.

    Options:
        rank: dimensions of the space; 0 is half of the input's.
        temperature: the initial one.
    """

    rank: Count = 0
    temperature: Positive = 0.3
    order: Literal["before", "after"] = "after"
    init_std: NonNegative = field(init=False, default=0.02)

    perturbation: ClassVar[float] = 0.0

    def make_score(self) -> Score:
        return scores.Cosine(self.dim, self.rank or max(self.dim // 2, 1), self.temperature, self.perturbation)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("cosine: noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")


@dataclass(eq=False, repr=False, kw_only=True)
class PerturbedCosine(Cosine):
    """Perturbed cosine router: a constant added to both norms, which makes the cosine gate identifiable.

    Nguyen et al. 2024, https://arxiv.org/abs/2405.14131.
    """

    perturbation: ClassVar[float] = 0.1


@dataclass(eq=False, repr=False, kw_only=True)
class Gaussian(TopK):
    """Gaussian gate: a token goes to the experts whose density around a centre it fits best.

    Xu, Jordan and Hinton 1994 (an alternative model for mixtures of experts): scores are log α + log N(x; μ, σ²).
    """

    kind: ClassVar[str] = "gaussian"
    freedom: ClassVar[float] = 1.0

    def make_score(self) -> Score:
        return scores.Distance(self.dim, self.kind, self.freedom, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")


@dataclass(eq=False, repr=False, kw_only=True)
class StudentT(Gaussian):
    """Student-t gate: as the Gaussian one with heavier tails, so that far tokens are less certain.

    Options:
        nu: degrees of freedom.
    """

    nu: Positive = 3.0
    kind: ClassVar[str] = "student_t"

    def make_score(self) -> Score:
        return scores.Distance(self.dim, self.kind, self.nu, self.init_std)


@dataclass(eq=False, repr=False, kw_only=True)
class Laplace(Gaussian):
    """Laplace gate: scores are minus the Euclidean distance to a centre.

    Nguyen et al. 2024 (HMoE with Laplace gating), https://arxiv.org/abs/2410.02935.
    """

    kind: ClassVar[str] = "laplace"


@dataclass(eq=False, repr=False, kw_only=True)
class Quadratic(TopK):
    """Quadratic gate: a quadratic form of low rank beside the linear score.

    Akbarian et al. 2024, https://arxiv.org/abs/2410.11222.

    Options:
        rank: of the quadratic form.
    """

    rank: PositiveInt = 4

    def make_score(self) -> Score:
        return scores.Quadratic(self.dim, self.rank, self.init_std)

    def check(self) -> None:
        super().check()
        if self.noise == "shazeer":
            raise ValueError("quadratic: noise: expected 'none', 'gaussian' or 'jitter', got 'shazeer'")


@dataclass(eq=False, repr=False, kw_only=True)
class SigmoidBias(Scored):
    """Sigmoid scores with a load bias instead of an auxiliary loss: chosen with s + b, weighted with s.

    Wang et al. 2024, https://arxiv.org/abs/2408.15664; DeepSeek-V3, https://arxiv.org/abs/2412.19437. After each training
    batch b rises by `rate` for experts below the mean load and falls for those above.

    Options:
        k: experts per token.
        rate: γ, the step of the bias.
    """

    k: PositiveInt = 2
    rate: NonNegative = 0.001

    def make_score(self) -> Score:
        return scores.Biased(self.dim, self.init_std)

    def _bias(self, columns: Columns, device: torch.device) -> Tensor:
        rows = [self.rows_of(key, rows, columns, device) for key, rows in columns.parts]
        return torch.cat([own.bias for own in rows])

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.top_k(scores_TE.sigmoid() + self._bias(columns, scores_TE.device), self.k)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.sigmoid_normed(scores_TE, columns_TK, absent_TK)

    @torch.no_grad()
    def learn_from(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> None:
        if not self.rate or not columns_TK.numel():
            return
        ones = torch.ones_like(columns_TK, dtype=torch.float32)
        ones = ones if absent_TK is None else ones.masked_fill(absent_TK, 0.0)
        load_E = ones.new_zeros(len(columns)).scatter_add(0, columns_TK.reshape(-1), ones.reshape(-1))
        step_E = self.rate * (load_E.mean() - load_E).sign()
        self.update_rows("bias", columns, lambda bias, own: bias + step_E[own].to(bias.dtype))

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class TopP(Scored):
    """Top-p: as few experts as it takes for their probabilities to reach p together.

    Huang et al. 2024 (Harder tasks need more experts), https://arxiv.org/abs/2403.07652. The entropy loss keeps tokens
    from asking for all experts.

    Options:
        p: the probability to reach.
        most: experts per token at most; 0 is no limit.
    """

    p: Probability = 0.4
    most: Count = 0
    switch: NonNegative = 0.01
    entropy: NonNegative = 0.0001

    exact_k = False
    fixed_k = False

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.top_p(scores_TE, self.p, self.most)

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.most or len(experts), len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class _Unlearned(Scored):
    """Scores without parameters: the k highest, with equal weights.

    Options:
        k: experts per token, with equal weights.
    """

    k: PositiveInt = 1
    switch: NonNegative = field(init=False, default=0.0)
    importance: NonNegative = field(init=False, default=0.0)
    z: NonNegative = field(init=False, default=0.0)
    entropy: NonNegative = field(init=False, default=0.0)
    mutual_information: NonNegative = field(init=False, default=0.0)
    orthogonality: NonNegative = field(init=False, default=0.0)
    init_std: NonNegative = field(init=False, default=0.02)

    def select(self, scores_TE: Tensor, columns: Columns, context: RouteContext, training: bool) -> Selection:
        return select.top_k(scores_TE, self.k)

    def weigh(self, scores_TE: Tensor, columns_TK: Tensor, absent_TK: Tensor | None, columns: Columns) -> Tensor:
        return weigh.equal(scores_TE, columns_TK, absent_TK)

    def experts_per_token(self, experts: ExpertView) -> int:
        return min(self.k, len(experts))


@dataclass(eq=False, repr=False, kw_only=True)
class Hash(_Unlearned):
    """Hash: a token's vocabulary id alone says where it goes; nothing is learned.

    Roller et al. 2021, https://arxiv.org/abs/2106.04426. By rendezvous hashing, so that an added expert takes over its
    share of the vocabulary and moves no other token.

    Options:
        seed: of the hash.
    """

    seed: int = 0

    needs = frozenset({"token_ids"})
    by_token_id: ClassVar[bool] = True

    def make_score(self) -> Score:
        return scores.Hashed(self.dim, self.seed)


@dataclass(eq=False, repr=False, kw_only=True)
class Random(_Unlearned):
    """Random: each token's experts are drawn anew at every pass, with equal weights.

    Zuo et al. 2022 (THOR), https://arxiv.org/abs/2110.04260, which adds a consistency loss between two passes
    (`cmoe.moe.losses.consistency_loss`).
    """

    permutation_equivariant = False
    isolatable = False

    def make_score(self) -> Score:
        return scores.Drawn(self.dim)


@dataclass(eq=False, repr=False, kw_only=True)
class FrozenRandom(TopK):
    """Frozen random router: linear scores that are drawn once and never learned; a baseline for learned routing.

    Chen et al. 2023 (SMoE-Dropout), https://arxiv.org/abs/2303.01610. A balance loss could only move the backbone, so there
    is none unless it is asked for.
    """

    switch: NonNegative = 0.0
    orthogonality: NonNegative = field(init=False, default=0.0)
    init_std: NonNegative = field(init=False, default=0.02)

    def make_score(self) -> Score:
        return scores.Frozen(self.dim)
