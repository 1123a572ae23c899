"""Hard attention to the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.config.types import NonNegative, Positive
from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.learners.model import Output
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.beside import refuse_beside
from cmoe.strategies.gates import BESIDE, hidden_layers, place
from cmoe.strategies.isolation import Fixed, need_own_outputs, train_outputs_of

LARGEST_EXPONENT = 50.0  # of cosh, which would overflow
LARGEST_EMBEDDING = 6.0  # beyond it a sigmoid is flat

_PASSES = "hat's annealing counts the batches of the experience's own data, it trains on others"


class HAT(Strategy):
    """Hard attention to the task: each task learns which hidden units it uses, and protects them (Serrà et al. 2018).

    https://arxiv.org/abs/1801.01423.
    Unit i's activity is multiplied by a_i = σ(s e_i), with an embedding e of each task that the optimizer trains
    along. Within an epoch s rises linearly from 1 / s_max to s_max, where it is in evaluation. The gradient of a weight
    from unit j to unit i is multiplied by 1 − min(A_i, A_j), with A the largest attention of earlier tasks (for
    an input 1), that of a bias by 1 − A_i, and that of an embedding by s_max (cosh(s e) + 1) / (s (cosh(e) + 1)). The loss
    gains ``strength`` · Σ a_i (1 − A_i) / Σ (1 − A_i). Weights whose factor is 0 stay bit-identical under any
    optimizer; the rule for the others is meant for plain SGD, as Adam makes steps of one size from gradients of any.
    Each task has outputs of its own; works on the backbone `mlp`.

    Options:
        s_max: steepness of the gates in evaluation, at least 1.
        strength: weight of the attention to units that no earlier task uses.
    """

    owns_predict: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(self, s_max: Positive = 400.0, strength: NonNegative = 0.75) -> None:
        self.s_max, self.strength = s_max, strength
        self.embeddings: dict[int, list[nn.Parameter]] = {}  # by task, (H,) of each layer
        self.attended: list[Tensor] = []  # of each layer, the largest attention of finished tasks, (H,)
        self.step = 0  # of the phase
        self.batches = 1  # in an epoch
        self.current: tuple[int, ...] = ()
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._fixed = Fixed()

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.s_max < 1:
            raise UserError(f"strategy.hat.s_max: expected a number >= 1, got {self.s_max}")
        refuse_beside(context, "hat", BESIDE | dict.fromkeys(("gdumb", "cumulative"), _PASSES))
        self.layers = hidden_layers(context, "hat")
        need_own_outputs(context, "hat")
        place(context.model.backbone, self.layers, self.gate)

    # -- attention ----------------------------------------------------------------------------------------------

    def embedding(self, task: int) -> list[nn.Parameter]:
        """A task's embedding for each layer, (H,); drawn from N(0, 1) with a seed of its own."""
        if task not in self.embeddings:
            generator = torch.Generator().manual_seed(self.context.seed(f"hat {task}"))
            sizes = [layer.out_features for layer in self.layers]
            with torch.inference_mode(False):  # an evaluation may be the first to ask
                drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
                self.embeddings[task] = [nn.Parameter(e.to(self.context.device, self._dtype)) for e in drawn]
        return self.embeddings[task]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.layers[0].weight.dtype, torch.float32)

    @property
    def scale(self) -> float:
        """s of the present step."""
        if self.batches == 1:
            return self.s_max
        done = (self.step % self.batches) / (self.batches - 1)
        return 1 / self.s_max + (self.s_max - 1 / self.s_max) * done

    def attention(self, task: int, layer: int, scale: float) -> Tensor:
        """The gates of a layer's units, (H,)."""
        # the derivative of an open gate's sigmoid, a (1 - a), is lost to rounding, and its compensation multiplies it again
        return F.logsigmoid(scale * self.embedding(task)[layer]).exp()

    def gate(self, layer: int, context: RouteContext) -> Tensor:
        """The gates of a layer's units, (H,) or (B, H); they learn where a task of the segment is trained."""
        task, training = context.task, context.training
        if training is None:
            training = self.context.model.training
        if isinstance(task, int):
            return self._gate(task, layer, training)
        assert task is not None
        every = [self._gate(t, layer, training) for t in range(len(self.context.stream.experiences))]
        return torch.stack(every).index_select(0, task)

    def _gate(self, task: int, layer: int, training: bool) -> Tensor:
        if training and task in self.current:
            return self.attention(task, layer, self.scale)
        return self.attention(task, layer, self.s_max).detach()

    # -- training -----------------------------------------------------------------------------------------------

    def before_experience(self, segment: Segment) -> None:
        self.step = 0
        train_outputs_of(self.context.model.head, segment.experiences)

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """Embeddings are trained in phases that train all there is."""
        plain = [p.hooks and p.parameters is None and p.objective is None for p in phases]

        def parameters() -> Sequence[nn.Parameter]:
            own = [e for task in segment.experiences for e in self.embedding(task)]
            return [*(p for p in self.context.model.parameters() if p.requires_grad), *own]

        return [replace(p, parameters=parameters) if own else p for p, own in zip(phases, plain, strict=True)]

    def before_phase(self, segment: Segment, phase: Phase) -> None:
        self.current = segment.experiences
        trainer = self.context.options["trainer"]
        samples = sum(len(self.context.stream.experiences[e].train) for e in segment.experiences)
        self.batches = -(-samples // trainer["batch_size"])
        if trainer["max_steps"]:
            self.batches = min(self.batches, trainer["max_steps"])
        self._factors = self._plasticity() if self.attended else []
        self._fixed = Fixed((p, factor > 0) for p, factor in self._factors)

    def _plasticity(self) -> list[tuple[Tensor, Tensor]]:
        """What the gradients of weights and biases are multiplied by."""
        factors: list[tuple[Tensor, Tensor]] = []
        before = None
        for layer, attended in zip(self.layers, self.attended, strict=True):
            of_units = attended.unsqueeze(1).expand_as(layer.weight)
            held = of_units if before is None else torch.minimum(of_units, before)
            factors += [(layer.weight, 1 - held), (layer.bias, 1 - attended)]
            before = attended
        return factors

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if not self.strength:
            return {}
        each = [self._used(task) for task in self.current]
        return {"hat": self.strength * torch.stack(each).mean()}

    def _used(self, task: int) -> Tensor:
        """The share of what no earlier task attends to that a task attends to."""
        attention = torch.cat([self.attention(task, i, self.scale) for i in range(len(self.layers))])
        unused = 1 - torch.cat(self.attended) if self.attended else torch.ones_like(attention)
        return (attention * unused).sum() / unused.sum().clamp(min=1e-6)  # 0 where all are used

    @torch.no_grad()
    def edit_gradients(self) -> None:
        for parameter, factor in self._factors:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        s = self.scale
        for e in (e for task in self.current for e in self.embedding(task)):
            if e.grad is not None:
                steep = (s * e).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).cosh() + 1
                e.grad.mul_(self.s_max / s * steep / (e.cosh() + 1))

    @torch.no_grad()
    def after_step(self, batch: Batch, output: Output) -> None:
        self._fixed.restore()
        for e in (e for task in self.current for e in self.embedding(task)):
            e.clamp_(-LARGEST_EMBEDDING, LARGEST_EMBEDDING)
        self.step += 1

    def after_phase(self, segment: Segment, phase: Phase) -> None:
        self.step = 0

    @torch.no_grad()
    def after_experience(self, segment: Segment) -> None:
        for task in segment.experiences:
            now = [self.attention(task, i, self.s_max) for i in range(len(self.layers))]
            old = self.attended or [torch.zeros_like(a) for a in now]
            self.attended = [torch.maximum(a, b) for a, b in zip(old, now, strict=True)]

    # -- the run ------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        return None if task is None else self.context.model(x, self.context.route(task)).logits

    def parameters(self) -> int:
        return sum(e.numel() for embedding in self.embeddings.values() for e in embedding)

    def facts(self) -> dict[str, float]:
        held = [e for embedding in self.embeddings.values() for e in embedding] + self.attended
        used = float(torch.cat(self.attended).mean()) if self.attended else 0.0
        return {"hat/bytes": float(sum(t.numel() * t.element_size() for t in held)), "hat/used": used}

    def state_dict(self) -> dict[str, Any]:
        embeddings = {task: [e.detach() for e in embedding] for task, embedding in self.embeddings.items()}
        return {"embeddings": embeddings, "attended": list(self.attended), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.context.device
        self.embeddings = {
            task: [nn.Parameter(e.detach().clone().to(device)) for e in embedding]
            for task, embedding in state["embeddings"].items()
        }
        self.attended = [a.to(device) for a in state["attended"]]
        self.step = state["step"]
