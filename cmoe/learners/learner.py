"""The Lightning module: one step, the same for every strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cmoe.learners.batch import Batch
from cmoe.learners.hooks import Forward, StepHooks, overridden
from cmoe.learners.model import Model, Output
from cmoe.learners.objective import Objective
from cmoe.moe import RouteContext
from cmoe.streams import Chunk

Log = Callable[[dict[str, float], int], None]


class Learner(pl.LightningModule):
    """Steps through chunks of mini-batches:

    ``batch → outputs → named losses → gradients → edits, in list order → clip → optimizer step``

    Args:
        model: backbone and head.
        objective: the task's loss.
        hooks: the strategies, in their order.
        clip_norm: gradients are scaled to at most this Euclidean norm; 0 is off.
        clip_value: gradients are clipped to this absolute value; 0 is off.
        log: called with losses by name and the step.
        log_every: steps between two calls; 0 is off.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        hooks: Sequence[StepHooks],
        *,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        log: Log | None = None,
        log_every: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.objective = model, objective
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.log_losses, self.log_every = log, log_every
        self.steps = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks = list(hooks)
        self._rates: Callable[[int], float] | None = None
        self._made: list[Tensor] = [torch.zeros(())]  # losses of the last step
        self.begin_phase(None, None)

    def begin_phase(
        self,
        optimizer: torch.optim.Optimizer | None,
        rates: Callable[[int], float] | None,
        loss: Callable[[Output, Batch], dict[str, Tensor]] | None = None,
        hooks: bool = True,
        objective: Callable[[Batch], dict[str, Tensor]] | None = None,
    ) -> None:
        """Set what the steps of the next fit use.

        Args:
            optimizer: over the trainable parameters.
            rates: the learning rate's factor at a step of this phase; None leaves it alone.
            loss: replaces the task's loss in this phase.
            hooks: whether strategies act inside the steps of this phase.
            objective: losses of a batch that is not put through the model (it trains something else); no strategy acts
                inside such steps.
        """
        active = self.hooks if hooks and objective is None else []
        self.optimizer, self._rates = optimizer, rates
        self._base_rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self._extend = overridden(active, "extend_batch")
        self._losses = overridden(active, "losses")
        self._edit = overridden(active, "edit_gradients")
        self._after = overridden(active, "after_step")
        self._gradient_rule = next((h.gradients for h in active if h.owns_gradients), self._sum_rule)
        self._task_loss = loss
        self._phase_objective = objective
        # those of this phase: the gradients of others are neither zeroed nor used, and must not count when clipping
        self._trainable = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self.phase_steps = 0

    def configure_optimizers(self) -> None:
        """None: the step drives a torch optimizer itself, at half the cost of Lightning's wrapper."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Chunks know how to move; on the CPU they stay where they are."""
        return batch if device.type == "cpu" else batch.to(device)

    def training_step(self, chunk: Chunk, batch_idx: int) -> None:
        """Every mini-batch of a chunk."""
        whose = chunk.experience
        for i, x in enumerate(chunk.x):
            task = chunk.task[i] if whose is None else whose
            self.step(Batch(x, chunk.y[i], task, chunk.ids[i], x.shape[0]))
        self._finite()

    def step(self, batch: Batch) -> Output | None:
        """One update of the weights; returns the outputs it was made from, None where the model made none."""
        optimizer = self.optimizer
        assert optimizer is not None
        for extend in self._extend:
            batch = extend(batch)
        if self._rates is not None:
            factor = self._rates(self.phase_steps)
            for group, base in zip(optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base * factor
        optimizer.zero_grad(set_to_none=True)
        if self._phase_objective is None:
            output, losses = self._gradient_rule(batch, self._forward)
        else:
            output, losses = None, self._phase_objective(batch)
            total_of(losses.values()).backward()
        self._made = [value.detach() for value in losses.values()]  # added up when somebody asks
        for edit in self._edit:
            edit()
        if self.clip_norm or self.clip_value:
            self._clip()
        optimizer.step()
        for after in self._after:
            after(batch, output)
        self.steps += 1
        self.phase_steps += 1
        if self.log_every and self.steps % self.log_every == 0:
            self._log(losses)
        return output

    def _sum_rule(self, batch: Batch, forward: Forward) -> tuple[Output, dict[str, Tensor]]:
        """The gradients of the sum of all losses."""
        output, losses = forward(batch)
        total_of(losses.values()).backward()
        return output, losses

    def _forward(self, batch: Batch) -> tuple[Output, dict[str, Tensor]]:
        output = self.model(batch.x, RouteContext(task=batch.task, training=True))
        return output, self._named_losses(output, batch)

    def _named_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if self._task_loss is not None:
            losses = self._task_loss(output, batch)
        else:
            losses = {"task": self.objective.loss(output.logits, batch)}
        if output.routings:
            losses.update(output.auxiliary())
        for more in self._losses:
            for name, loss in more(output, batch).items():  # two of one name both count
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

    def _clip(self) -> None:
        if self.clip_value:
            torch.nn.utils.clip_grad_value_(self._trainable, self.clip_value)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._trainable, self.clip_norm)

    def _finite(self) -> float:
        """The last step's loss.

        Raises:
            FloatingPointError: it is not a number, or infinite.
        """
        value = float(total_of(self._made))
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.steps}")
        return value

    def _log(self, losses: dict[str, Tensor]) -> None:
        value = self._finite()
        if self.log_losses is not None:
            values = {f"train/loss_{name}": float(v.detach()) for name, v in losses.items()}
            self.log_losses({"train/loss": value, **values}, self.steps)


def total_of(losses: Iterable[Tensor]) -> Tensor:
    """The sum of losses, each a scalar."""
    each = list(losses)
    return each[0] if len(each) == 1 else torch.stack(each).sum()
