"""What strategies share that infer the task label of a sample, for whatever needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners.head import NEVER
from cmoe.learners.model import Model
from cmoe.strategies.base import Context, Segment, Strategy
from cmoe.strategies.look import seen
from cmoe.strategies.teacher import as_it_is, restored, state_of

Answer = Callable[[int], Tensor]


class InferTask(Strategy):
    """Base of strategies that say from which experience a sample is, beside any that needs to know it.

    Where no task label is given, each sample's experience is inferred, and the answer is that of the network for this
    label among the experience's own classes: experts by task (`expand`), networks of their own (`separate`), masks
    (`packnet`, `hat`, `xdg`, `pnn`). With `decide: all` the answers of all experiences count, by their probabilities:
    p(y | x) = Σ p(t | x) p(y | x, t).

    Attributes:
        called: its name in a configuration, for errors and figures.
        on: what is looked at: 'inputs', or 'features' of the network as it was after the first experience.
        known: experiences that can be told, in the order of the columns of `scores`.

    Args:
        on: as above.
        decide: 'best' or 'all'.
    """

    infers_task: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True
    called: ClassVar[str]

    def __init__(self, on: Literal["inputs", "features"], decide: Literal["best", "all"]) -> None:
        self.on, self.decide = on, decide
        self.known: list[int] = []
        self.network: Model | None = None

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language:
            raise UserError(f"strategy.{self.called}: expected a stream with classes, got language modelling")
        if self.on == "inputs" and not context.stream.experiences[0].train.x.dim() > 1:
            raise UserError(f"strategy.{self.called}.on: expected 'features' for samples of one number, got 'inputs'")
        if self.on == "inputs" and context.stream.vocabulary is not None:
            raise UserError(f"strategy.{self.called}.on: expected 'features' where inputs are tokens, got 'inputs'")

    # -- what it learns -------------------------------------------------------------------------------------------

    def after_experience(self, segment: Segment) -> None:
        if self.on == "features" and self.network is None:
            self.network = as_it_is(self.context)
        for e in segment.experiences:
            if e not in self.known:
                self.learn(e, *self._seen(e))
                self.known.append(e)

    def learn(self, experience: int, x_ND: Tensor, y_N: Tensor) -> None:
        """Take in an experience that was just learned.

        Args:
            experience: its index.
            x_ND: its training samples as they are looked at, float64.
            y_N: their classes.
        """

    def _seen(self, experience: int) -> tuple[Tensor, Tensor]:
        return seen(self.context, self.context.stream.experiences[experience].train, experience, self.looked_at)

    def looked_at(self, x: Tensor) -> Tensor:
        """(B, D) float64 of inputs (B, ...)."""
        if self.on == "features":
            assert self.network is not None
            x = self.network(x, self.context.route(self.known[0] if self.known else 0)).features
        return x.flatten(1).double()

    # -- what it says ---------------------------------------------------------------------------------------------

    def scores(self, x: Tensor, answer: Answer) -> Tensor:
        """Log-probabilities of the known experiences but for a constant of each sample, (B, T).

        Args:
            x: inputs (B, ...).
            answer: an experience's log-probabilities of its own outputs for all of them, (B, C).
        """
        raise NotImplementedError

    def decided(self, x: Tensor, own: Callable[[Tensor, int | None], Tensor | None] | None) -> Tensor | None:
        """Log-probabilities (B, U) of all outputs without a task label; None as long as nothing is known.

        Args:
            x: inputs (B, ...).
            own: another strategy's rule for a given label; None is the model's.
        """
        if not self.known:
            return None
        answers: dict[int, Tensor] = {}

        def answer(task: int) -> Tensor:
            if task not in answers:
                answers[task] = self._answer(x, task, own)
            return answers[task]

        log_p_BT = self.scores(x, answer).log_softmax(1)
        head = self.context.model.head
        logits = torch.full((len(x), len(head)), NEVER, dtype=log_p_BT.dtype, device=x.device)
        best_B = log_p_BT.argmax(1)
        for place, task in enumerate(self.known):
            columns = self._columns(task)
            if self.decide == "all":
                mine = answer(task).to(log_p_BT.dtype) + log_p_BT[:, place : place + 1]
                logits[:, columns] = torch.logaddexp(logits[:, columns], mine)
                continue
            rows = (best_B == place).nonzero().squeeze(1)
            if len(rows):
                mine = answers[task][rows] if task in answers else self._answer(x[rows], task, own)
                logits[rows.unsqueeze(1), columns] = mine.to(logits.dtype)
        return logits

    def _columns(self, task: int) -> Tensor:
        head = self.context.model.head
        columns = head.columns(self.context.stream.experiences[task].classes, task)
        return torch.arange(len(head), device=self.context.device) if columns is None else columns

    def _answer(self, x: Tensor, task: int, own: Any) -> Tensor:
        logits = own(x, task) if own is not None else None
        if logits is None:
            logits = self.context.model(x, self.context.route(task)).logits
        return F.log_softmax(logits.index_select(1, self._columns(task)).double(), dim=1)

    # -- the run --------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """What it has learned."""
        return []

    def parameters(self) -> int:
        own = 0 if self.network is None else sum(p.numel() for p in self.network.backbone.parameters())
        return own + sum(t.numel() for t in self.tensors())

    def facts(self) -> dict[str, float]:
        network = [] if self.network is None else list(self.network.backbone.parameters())
        held = sum(t.numel() * t.element_size() for t in (*self.tensors(), *network))
        return {f"{self.called}/bytes": float(held)}

    def state_dict(self) -> dict[str, Any]:
        return {"known": list(self.known), "network": state_of(self.network)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = list(state["known"])
        self.network = restored(self.context, state["network"])
