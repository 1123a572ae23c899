"""Selection of experts for ensemble diversification."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmoe.config.types import NonNegative, Positive, PositiveInt, Probability
from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.learners.head import NEVER
from cmoe.learners.model import Model, Output
from cmoe.moe import surgery
from cmoe.strategies.base import Context, Segment
from cmoe.strategies.expand import Expand
from cmoe.strategies.gaussians import divergence, fitted, log_density
from cmoe.strategies.look import seen
from cmoe.strategies.teacher import as_it_is, restored, state_of

Key = tuple[int, int, int]  # expert, experience, class


class SEED(Expand):
    """SEED: a few experts, of which each experience trains one; all vote by Gaussians of the classes (Rypeść et al. 2024).

    https://arxiv.org/abs/2401.10191. The first experiences add an expert each, as `expand` does with the router `task_table`.
    Later ones fine-tune the expert in whose features their classes overlap least: whose Gaussians of the new classes have
    the largest symmetric Kullback-Leibler divergence, on average over pairs. Its features on the new data are held near
    what they were. After each experience every expert keeps a Gaussian of each new class in its own features; those of
    old classes stay. A sample's answer is the mean, over the experts that know a class, of softmax(log N / temperature)
    over the classes that the expert knows. What is no expert is trained in the first experience only. No sample is kept.

    Options:
        most: experts at most.
        distillation: weight of the mean squared distance of a fine-tuned expert's features to its old ones.
        shrinkage: ε of the covariances, (1 − ε) Σ + ε s I with s the mean variance; above 0.
        temperature: of the softmax over log-densities.
        init: weights of added experts: 'fresh', or as `expand` knows them.
    """

    owns_predict: ClassVar[bool] = True
    infers_task: ClassVar[bool] = True  # all experts vote, whatever the task
    needs: ClassVar[tuple[str, ...]] = ("moe",)

    def __init__(
        self,
        most: PositiveInt = 5,
        distillation: NonNegative = 1.0,
        shrinkage: Probability = 0.05,
        temperature: Positive = 1.0,
        init: str = "fresh",
    ) -> None:
        super().__init__(experts=1, init=init, isolate=True)  # ty: ignore[invalid-argument-type] - checked there
        self.most, self.distillation, self.shrinkage, self.temperature = most, distillation, shrinkage, temperature
        self.first: list[int] = []  # of each expert, an experience that is assigned to it
        self.chosen: dict[int, int] = {}  # of each experience, the expert that it trained
        self.gaussians: dict[Key, tuple[Tensor, Tensor]] = {}
        self.old: Model | None = None
        self._factors: dict[Key, Tensor] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language:
            raise UserError("strategy.seed: expected a stream with classes, got language modelling")
        if not self.shrinkage:
            raise UserError("strategy.seed.shrinkage: expected a number above 0 and up to 1, got 0")

    # -- training -------------------------------------------------------------------------------------------------

    def before_experience(self, segment: Segment) -> None:
        if len(self.first) < self.most:
            super().before_experience(segment)
            self.first.append(segment.last)
            expert = len(self.first) - 1
        else:
            expert = self._best(segment)
            self._go_on(expert, segment)
        self.chosen |= dict.fromkeys(segment.experiences, expert)

    def _go_on(self, expert: int, segment: Segment) -> None:
        """Let an expert learn again, and serve the segment's tasks."""
        context, model, last = self.context, self.context.model, segment.last
        layers = model.moe_layers()
        old = {name: [i for i in layer.ids if i not in layer.frozen_ids] for name, layer in layers.items()}
        context.record(surgery.freeze(model, old), last)
        mine = {name: list(layer.tasks[self.first[expert]]) for name, layer in layers.items()}
        for task in segment.experiences:
            context.record(surgery.assign(model, mine, task), last)
        if self.distillation:
            self.old = as_it_is(context)
        context.record(surgery.thaw(model, mine), last)
        self._isolate(layers, mine, list(segment.experiences))

    def _best(self, segment: Segment) -> int:
        """The expert in whose features the segment's classes overlap least; the first of equals."""
        spread = []
        for expert in range(len(self.first)):
            own = list(self._fitted(expert, segment.experiences).values())
            pairs = [divergence(a, b) for a, b in combinations(own, 2)]
            spread.append(sum(pairs) / max(len(pairs), 1))
        return max(range(len(spread)), key=spread.__getitem__)

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if self.old is None:
            return {}
        with torch.no_grad():
            before = self.old(batch.x, self.context.route(batch.task)).features
        apart = (output.features - before).square().sum(1).mean()
        return {"features": self.distillation * apart}

    @torch.no_grad()
    def after_experience(self, segment: Segment) -> None:
        for expert in range(len(self.first)):
            self.gaussians |= self._fitted(expert, segment.experiences)
        self._factors.clear()
        self.old = None

    def _fitted(self, expert: int, experiences: Sequence[int]) -> dict[Key, tuple[Tensor, Tensor]]:
        """Gaussians of the experiences' classes in an expert's features."""
        found = {}
        for e in experiences:
            split = self.context.stream.experiences[e].train
            x_ND, y_N = seen(self.context, split, e, lambda x: self._features(x, expert))
            found |= {(expert, e, c): fitted(x_ND[y_N == c], self.shrinkage) for c in y_N.unique().tolist()}
        return found

    def _features(self, x: Tensor, expert: int) -> Tensor:
        return self.context.model(x, self.context.route(self.first[expert])).features.double()

    # -- deciding -------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        """The log of the experts' mean vote for each output."""
        if not self.gaussians:
            return None
        head = self.context.model.head
        total = torch.zeros(len(x), len(head), dtype=torch.float64, device=x.device)
        voters = torch.zeros(len(head), dtype=torch.float64, device=x.device)
        for expert in range(len(self.first)):
            known = self._log_densities(x, expert)
            if known is None:
                continue
            columns, densities = known
            total.index_add_(1, columns, (densities / self.temperature).softmax(1))
            voters.index_add_(0, columns, torch.ones(len(columns), dtype=torch.float64, device=x.device))
        mean = total / voters.clamp(min=1)
        return mean.clamp(min=1e-300).log().masked_fill(voters == 0, NEVER)

    def _log_densities(self, x: Tensor, expert: int) -> tuple[Tensor, Tensor] | None:
        """Outputs (C,) that an expert knows, and the log-densities (B, C) of their classes."""
        head, device = self.context.model.head, self.context.device
        x_BD = self._features(x, expert)
        by_output: dict[int, list[Tensor]] = {}
        for key, (mean, covariance) in self.gaussians.items():
            if key[0] != expert:
                continue
            if key not in self._factors:
                self._factors[key] = torch.linalg.cholesky(covariance)
            output = int(head.targets(torch.tensor([key[2]], device=device), key[1]))
            by_output.setdefault(output, []).append(log_density(x_BD, mean, self._factors[key]))
        if not by_output:
            return None
        densities = [torch.stack(each, 1).logsumexp(1) for each in by_output.values()]
        return torch.tensor(list(by_output), device=device), torch.stack(densities, 1)

    # -- the run --------------------------------------------------------------------------------------------------

    def parameters(self) -> int:
        return sum(m.numel() + s.numel() for m, s in self.gaussians.values())

    def facts(self) -> dict[str, float]:
        held = sum(t.numel() * t.element_size() for pair in self.gaussians.values() for t in pair)
        return super().facts() | {"seed/bytes": float(held)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": list(self.first),
            "chosen": dict(self.chosen),
            "gaussians": dict(self.gaussians),
            "old": state_of(self.old),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.context.device
        self.first, self.chosen = list(state["first"]), dict(state["chosen"])
        self.gaussians = {key: (m.to(device), s.to(device)) for key, (m, s) in state["gaussians"].items()}
        self.old = restored(self.context, state["old"])
        self._factors.clear()
