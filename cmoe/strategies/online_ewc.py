"""Online elastic weight consolidation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmoe.config.types import NonNegative, Probability
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.strategies.base import Segment, Strategy
from cmoe.streams import evaluation_batches


class OnlineEWC(Strategy):
    """Online EWC: one running diagonal Fisher holds weights near their last values (Schwarz et al. 2018).

    After an experience the Fisher is the mean over its samples of a weighted squared gradient of log p(y|x), each
    sample on its own; running Fisher = gamma · running + new; the penalty is ``strength`` · Σ F (θ − θ*)², without a
    factor ½.

    Options:
        strength: weight of the penalty; not portable between estimates of the Fisher.
        gamma: decay of the running Fisher at each experience.
        fisher: 'empirical' (true label), or 'confidence' (true label, each sample's squared gradient weighted by its
            p(y|x), as in the reference code of Dark Experience).
    """

    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self,
        strength: NonNegative = 1.0,
        gamma: Probability = 1.0,
        fisher: Literal["empirical", "confidence"] = "empirical",
    ) -> None:
        self.strength, self.gamma, self.fisher = strength, gamma, fisher
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._pairs: list[tuple[torch.nn.Parameter, Tensor, Tensor]] | None = None

    def before_experience(self, segment: Segment) -> None:
        self._pairs = None

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if not self.importance:
            return {}
        if self._pairs is None:
            self._pairs = [
                (p, self.importance[name].to(p.device), self.anchor[name].to(p.device))
                for name, p in self.context.model.named_parameters()
                if p.requires_grad and name in self.importance and p.shape == self.anchor[name].shape
            ]
        penalty = [(f * (p - a).square()).sum() for p, f, a in self._pairs]
        if not penalty:
            return {}
        return {"ewc": self.strength * torch.stack(penalty).sum()}

    def after_experience(self, segment: Segment) -> None:
        new = self._fisher(segment)
        weights = dict(self.context.model.named_parameters())
        old = self.importance
        self.importance = {
            n: f + self.gamma * old[n] if n in old and old[n].shape == f.shape else f for n, f in new.items()
        }
        for name, f in old.items():  # weights that are frozen now but may thaw
            if name not in self.importance and name in weights:
                self.importance[name] = self.gamma * f
        self.anchor = {n: weights[n].detach().clone() for n in self.importance}
        self._pairs = None

    def _fisher(self, segment: Segment) -> dict[str, Tensor]:
        """The Fisher's diagonal by parameter name, over the segment's training samples."""
        context = self.context
        model = context.model.eval()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in named.items()}
        count = 0
        # routing by data cannot be vectorised over samples, a dense model can
        vectorised = not model.moe_layers() and context.stream.modality in ("image", "vector")
        for e in segment.experiences:
            experience = context.stream.experiences[e]
            for batch in evaluation_batches(experience.train, e, context.stream.transform, 64 if vectorised else 1):
                x, y = context.placed(batch.x), batch.y.to(context.device)
                add = self._vectorised if vectorised else self._single
                add(total, named, x, y, e)
                count += x.shape[0]
        model.train()
        return {n: f.div_(max(1, count)) for n, f in total.items()}

    def _vectorised(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        context = self.context
        frozen = {n: p.detach() for n, p in context.model.named_parameters() if n not in named}

        def loss(weights: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
            x1, y1 = one_x.unsqueeze(0), one_y.unsqueeze(0)
            output = torch.func.functional_call(context.model, {**weights, **frozen}, (x1, context.route(task)))
            logits, target = context.objective.select(output.logits, Batch(x1, y1, task, y1, 1))
            return F.cross_entropy(logits, target)

        weights = {n: p.detach() for n, p in named.items()}
        with torch.no_grad():  # the head keeps its tables; made inside the transform they would be dead after it
            loss(weights, x[0], y[0])
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no batching rule
            gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0))(weights, x, y)
        weight = torch.exp(-losses) if self.fisher == "confidence" else torch.ones_like(losses)
        for n, g in gradients.items():
            total[n] += torch.einsum("b,b...->...", weight, g.square())

    def _single(self, total: dict[str, Tensor], named: dict[str, Any], x: Tensor, y: Tensor, task: int) -> None:
        context = self.context
        output = context.model(x, context.route(task))
        loss = context.objective.loss(output.logits, Batch(x, y, task, y, x.shape[0]))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        weight = float(torch.exp(-loss.detach())) if self.fisher == "confidence" else 1.0
        for n, g in zip(named, gradients, strict=True):
            if g is not None:
                total[n] += weight * g.square()

    def facts(self) -> dict[str, float]:
        held = [*self.importance.values(), *self.anchor.values()]
        return {"ewc/bytes": float(sum(t.numel() * t.element_size() for t in held))}

    def state_dict(self) -> dict[str, Any]:
        return {"importance": self.importance, "anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance, self.anchor = dict(state["importance"]), dict(state["anchor"])
        self._pairs = None
