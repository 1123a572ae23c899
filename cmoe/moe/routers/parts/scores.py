"""How well an expert suits a token: scores (T, E), one column per expert, with parameters owned per cohort of experts.

A score sees each cohort apart, so that an expert's column never depends on how many others there are. Products are
computed in at least float32: scores of bfloat16 tie and flip choices, and a CPU without instructions for them is slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe.routing import RouteContext, score_dtype


def exact(values: Tensor) -> Tensor:
    """In the type that scores are computed in."""
    return values.to(score_dtype(values.dtype))


def product(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x · w for each row w, plus a bias, in the type that scores are computed in."""
    return F.linear(exact(x_TD), exact(weight_ED), None if bias_E is None else exact(bias_E))


class Score(nn.Module):
    """Base of scores.

    Args:
        dim: input dimension D.
        init_std: standard deviation of initial expert vectors.
    """

    def __init__(self, dim: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.dim, self.init_std = dim, init_std

    carries_state: ClassVar[bool] = False  # whether what `tokens` gave is the next layer's state

    def new_columns(self, n: int) -> nn.Module | None:
        """Parameters and buffers with `n` rows, zeros so far; None where a column needs none."""
        return Rows(weight=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        """Draw initial values."""
        columns.weight.normal_(0.0, self.init_std)

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Any:
        """What is computed once for all cohorts; the tokens themselves unless a score projects them."""
        return exact(x_TD)

    def finish(self, scores_TE: Tensor) -> Tensor:
        """What is done with the scores of all visible experts together."""
        return scores_TE

    def vectors(self, columns: Any) -> Tensor:
        """What tells one expert from another, (n, ...); for losses that draw experts apart."""
        return columns.weight

    def active(self, rows: Sequence[nn.Module]) -> int:
        """How many parameters take part in scoring one token.

        Args:
            rows: what `new_columns` made, of all cohorts.
        """
        return sum(p.numel() for part in (self, *rows) for p in part.parameters())

    def flops(self, rows: Sequence[nn.Module]) -> int:
        """Floating point operations of scoring one token: each number that takes part is multiplied and added once."""
        fixed = sum(b.numel() for part in rows for b in part.buffers() if b.is_floating_point())
        return 2 * (self.active(rows) + fixed)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        """Scores (T, n) of one cohort's experts.

        Args:
            h: what `tokens` gave.
            columns: what `new_columns` made, or visible rows of it.
            ids: the experts' ids.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(h, columns, ids)")


class Rows(nn.Module):
    """Tensors with one row per expert: parameters by default, buffers for names in `fixed` and, of int64, in `counts`."""

    def __init__(self, fixed: tuple[str, ...] = (), counts: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if name in fixed:
                self.register_buffer(name, torch.zeros(shape))
            elif name in counts:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Linear(Score):
    """x · w, without bias."""

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return product(h, columns.weight)


class Frozen(Linear):
    """x · w with w drawn once and never learned, scaled to give scores of unit variance on tokens of unit variance."""

    def new_columns(self, n: int) -> nn.Module:
        return Rows(fixed=("weight",), weight=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        columns.weight.normal_(0.0, 1.0 / math.sqrt(self.dim))


class Cosine(Score):
    """cos(P x, e) / τ with a learned projection P to `rank` dimensions and a learned temperature τ ≥ 0.01."""

    def __init__(self, dim: int, rank: int, temperature: float, perturbation: float) -> None:
        super().__init__(dim)
        self.rank, self.perturbation = rank, perturbation
        self.project = nn.Linear(dim, rank, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.rank))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        nn.init.orthogonal_(columns.weight, gain=0.32)  # X-MoE's own

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        return self._unit(product(x_TD, self.project.weight))

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return product(h, self._unit(exact(columns.weight))) / exact(self.log_temperature).exp().clamp(min=0.01)

    def _unit(self, v: Tensor) -> Tensor:
        # the norm plus a constant instead of the larger of the two: the perturbed form, which for 0 is the usual one
        return v / (v.norm(dim=-1, keepdim=True) + max(self.perturbation, 1e-6))


class Distance(Score):
    """Minus a distance to each expert's centre μ, with a learned width σ per expert and a learned log-prior.

    gaussian: log α − D log σ − ‖x−μ‖²/(2σ²); student_t: log α − D log σ − (ν+D)/2 · log(1 + ‖x−μ‖²/(νσ²));
    laplace: log α − ‖x−μ‖/σ (the Laplace gate of HMoE, where σ is 1 at the start).
    """

    def __init__(self, dim: int, kind: str, freedom: float, init_std: float) -> None:
        super().__init__(dim, init_std)
        self.kind, self.freedom = kind, freedom

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim), log_width=(n,), log_prior=(n,))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        super().reset_columns(columns)
        # tokens of unit variance are √D away from anything near 0: this width makes that distance 1
        columns.log_width.fill_(0.0 if self.kind == "laplace" else 0.5 * math.log(self.dim))
        columns.log_prior.zero_()

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        # ‖x‖² − 2 x·μ + ‖μ‖², in which one product does the work
        centre, log_width, log_prior = (exact(p) for p in (columns.weight, columns.log_width, columns.log_prior))
        squared = h.square().sum(1, keepdim=True) - 2 * product(h, centre) + centre.square().sum(1)
        scaled = squared.clamp(min=0.0) * (-2 * log_width).exp()
        if self.kind == "laplace":
            return log_prior - (scaled + 1e-12).sqrt()
        if self.kind == "gaussian":
            return log_prior - self.dim * log_width - 0.5 * scaled
        tail = 0.5 * (self.freedom + self.dim) * torch.log1p(scaled / self.freedom)
        return log_prior - self.dim * log_width - tail


class Quadratic(Score):
    """w·x + Σ_r (u_r·x)(v_r·x): a quadratic form of rank `rank` per expert beside the linear one."""

    def __init__(self, dim: int, rank: int, init_std: float) -> None:
        super().__init__(dim, init_std)
        self.rank = rank

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim), left=(n, self.rank, self.dim), right=(n, self.rank, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        super().reset_columns(columns)
        columns.left.normal_(0.0, self.init_std)
        columns.right.normal_(0.0, self.init_std)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        n = columns.weight.shape[0]
        left, right = (product(h, m.reshape(n * self.rank, self.dim)) for m in (columns.left, columns.right))
        return product(h, columns.weight) + (left * right).view(-1, n, self.rank).sum(2)


class Attention(Score):
    """Yuan 2.0's attention router: each expert has a query, a key and a value of the token; experts attend to experts.

    score_i = Σ_j softmax_j(q_i k_j) v_j. The sum is over the visible experts, so an expert's score does depend on the
    others: `finish` computes it from the (T, 3 n) projections.
    """

    def new_columns(self, n: int) -> nn.Module:
        return Rows(query=(n, self.dim), key=(n, self.dim), value=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        for p in columns.parameters():
            p.normal_(0.0, 1.0 / math.sqrt(self.dim))

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return torch.stack([product(h, w) for w in (columns.query, columns.key, columns.value)], dim=2)

    def finish(self, scores_TE: Tensor) -> Tensor:
        query, key, value = scores_TE.unbind(2)
        attention = (query.unsqueeze(2) * key.unsqueeze(1)).softmax(2)
        return torch.bmm(attention, value.unsqueeze(2)).squeeze(2)

    def flops(self, rows: Sequence[Any]) -> int:
        return super().flops(rows) + 4 * sum(len(own.query) for own in rows) ** 2  # all with all, twice


class Recurrent(Score):
    """Layerwise recurrent router: a GRU carries a routing state from layer to layer; scores are its products with w."""

    carries_state: ClassVar[bool] = True

    def __init__(self, dim: int, rank: int, init_std: float) -> None:
        super().__init__(dim, init_std)
        self.rank = rank
        self.project, self.cell = nn.Linear(dim, rank), nn.GRUCell(rank, rank)

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.rank))

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        state = context.state
        fits = isinstance(state, Tensor) and state.shape == (x_TD.shape[0], self.rank)
        return self.cell(self.project(x_TD), state.to(x_TD.dtype) if fits else None)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return product(h, columns.weight)


class Task(Score):
    """x · w + embedding(task) · v: the task label takes part in the choice; with `alone` it is all that does."""

    def __init__(self, dim: int, tasks: int, rank: int, alone: bool, init_std: float) -> None:
        super().__init__(dim, init_std)
        self.tasks, self.rank, self.alone = tasks, rank, alone
        self.embedding = nn.Embedding(tasks, rank)

    def new_columns(self, n: int) -> nn.Module:
        return Rows(task=(n, self.rank)) if self.alone else Rows(weight=(n, self.dim), task=(n, self.rank))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        for p in columns.parameters():
            p.normal_(0.0, self.init_std)

    def vectors(self, columns: Any) -> Tensor:
        return columns.task if self.alone else torch.cat([columns.weight, columns.task], 1)

    def active(self, rows: Sequence[nn.Module]) -> int:
        return super().active(rows) - (self.tasks - 1) * self.rank  # one row of the embedding

    def flops(self, rows: Sequence[nn.Module]) -> int:
        return super().flops(rows) - 2 * self.rank  # which is looked up

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        label = torch.as_tensor(checked_label("task_embedding", context.task, self.tasks), device=x_TD.device)
        embedded = self.embedding(label).expand(x_TD.shape[0], -1)
        return exact(embedded) if self.alone else torch.cat([exact(x_TD), exact(embedded)], 1)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        if self.alone:
            return product(h, columns.task)
        return product(h, torch.cat([columns.weight, columns.task], 1))


class PerTask(Score):
    """x · w(task): each task has an expert vector of its own for every expert."""

    def __init__(self, dim: int, tasks: int, init_std: float) -> None:
        super().__init__(dim, init_std)
        self.tasks = tasks

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.tasks, self.dim))

    def tokens(self, x_TD: Tensor, context: RouteContext) -> tuple[Tensor, Tensor | int]:
        return exact(x_TD), checked_label("per_task", context.task, self.tasks)

    def active(self, rows: Sequence[nn.Module]) -> int:
        return super().active(rows) // self.tasks  # one task's vectors

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        x_TD, task = h
        if isinstance(task, int):
            return product(x_TD, columns.weight.select(1, task))
        n = columns.weight.shape[0]
        every = product(x_TD, columns.weight.reshape(n * self.tasks, self.dim)).view(-1, n, self.tasks)
        return every.gather(2, task.view(-1, 1, 1).expand(-1, n, 1)).squeeze(2)


def checked_label(router: str, task: Tensor | int | None, tasks: int) -> Tensor | int:
    """The task label of a context.

    Raises:
        ValueError: there is none, or it is not from 0 to below `tasks`.
    """
    if task is None:
        raise ValueError(f"{router}: expected a task label in the context, got none")
    ends = (task, task) if isinstance(task, int) else task.aminmax() if task.numel() else (0, 0)
    for end in map(int, ends):
        if not 0 <= end < tasks:
            raise ValueError(f"{router}: expected task labels from 0 to below tasks={tasks}, got {end}")
    return task


class Centroid(Score):
    """−‖x−c‖² to centroids that follow their tokens by an exponential mean instead of a gradient."""

    def new_columns(self, n: int) -> nn.Module:
        return Rows(fixed=("centre",), centre=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        columns.centre.normal_()

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        centre = exact(columns.centre).clone()  # moved before the backward pass needs it
        return -(h.square().sum(1, keepdim=True) - 2 * product(h, centre) + centre.square().sum(1))


class Hashed(Score):
    """A fixed pseudo-random number for each pair of token id and expert id, uniform in [0, 1).

    Choosing the highest is rendezvous hashing: an added expert takes over its share of the vocabulary and moves no
    other token.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim)
        self.seed = seed

    def new_columns(self, n: int) -> None:
        return None

    def reset_columns(self, columns: Any) -> None:
        pass

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        if context.token_ids is None:
            raise ValueError("hash: expected token ids in the context, got none")
        return context.token_ids

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        # integer mixing in 62 bits, the same on every device
        expert_E = torch.tensor(ids, dtype=torch.int64, device=h.device) * 2654435761 + self.seed * 40503 + 12345
        mixed_TE = (h.to(torch.int64).unsqueeze(1) * 1000003 + 97) ^ expert_E
        for _ in range(3):
            mixed_TE = ((mixed_TE ^ (mixed_TE >> 15)) * 2246822519) & 0x3FFFFFFF
            mixed_TE = ((mixed_TE ^ (mixed_TE >> 13)) * 3266489917) & 0x3FFFFFFF
        return mixed_TE.to(torch.float32) / 0x40000000


class Drawn(Score):
    """Scores drawn anew for every token: no expert suits any token better."""

    def new_columns(self, n: int) -> None:
        return None

    def reset_columns(self, columns: Any) -> None:
        pass

    def tokens(self, x_TD: Tensor, context: RouteContext) -> tuple[Tensor, torch.Generator | None]:
        return x_TD, context.generator

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        x_TD, generator = h
        return torch.rand(x_TD.shape[0], len(ids), device=x_TD.device, generator=generator)


class Biased(Linear):
    """x · w beside a load bias per expert, which is adjusted without a gradient and takes part in the choice only."""

    def new_columns(self, n: int) -> nn.Module:
        return Rows(fixed=("bias",), weight=(n, self.dim), bias=(n,))


class Thresholded(Cosine):
    """cos(x, w) beside a learned threshold per expert."""

    def __init__(self, dim: int) -> None:
        Score.__init__(self, dim)

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim), threshold=(n,))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        columns.weight.normal_(0.0, 1.0 / math.sqrt(self.dim))
        columns.threshold.zero_()

    def tokens(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        return F.normalize(exact(x_TD), dim=-1)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return product(h, F.normalize(exact(columns.weight), dim=-1))


class Grouped(Linear):
    """x · w for the choice within a group, and x · g for the choice of the group: scores (T, n, 2)."""

    def new_columns(self, n: int) -> nn.Module:
        return Rows(weight=(n, self.dim), group=(n, self.dim))

    @torch.no_grad()
    def reset_columns(self, columns: Any) -> None:
        super().reset_columns(columns)
        columns.group.normal_(0.0, self.init_std)

    def forward(self, h: Any, columns: Any, ids: tuple[int, ...]) -> Tensor:
        return torch.stack([product(h, columns.weight), product(h, columns.group)], dim=2)
