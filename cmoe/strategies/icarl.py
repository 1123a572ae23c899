"""Incremental classifier and representation learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.config.types import NonNegative, PositiveInt
from cmoe.errors import UserError
from cmoe.learners.batch import Batch
from cmoe.learners.head import NEVER
from cmoe.learners.model import Model, Output
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.herding import herd
from cmoe.strategies.look import seen
from cmoe.strategies.teacher import as_it_is, restored, state_of
from cmoe.streams import Experience, Split


class ICaRL(Strategy):
    """iCaRL: exemplars by herding, the nearest mean of exemplars decides, old outputs are distilled (Rebuffi et al. 2017).

    https://doi.org/10.1109/CVPR.2017.587.
    Exemplars of old classes are trained on beside the new data. The loss is the binary cross-entropy of each output of a
    class met so far, averaged over outputs and samples: the target of a new class is whether the sample is of it, that of
    an old class what the network of the last experience's end said. Each class keeps size / classes met exemplars, those
    whose means stay nearest to the class's mean feature.

    Options:
        size: exemplars of all classes together.
        normalize: features are put on the unit sphere before they are compared, and so are means, as in the paper.
        l2: weight of the sum of all squared weights, added to the loss.
    """

    owns_data: ClassVar[bool] = True
    owns_predict: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 500, normalize: bool = True, l2: NonNegative = 0.0) -> None:
        self.size, self.normalize, self.l2 = size, normalize, l2
        self.exemplars: dict[
            int, tuple[int, list[int]]
        ] = {}  # class -> its experience and rows of the storage, in order
        self.means = torch.zeros(0)
        self.old: Model | None = None

    def setup(self, context: Context) -> None:
        super().setup(context)
        if context.stream.language:
            raise UserError("strategy.icarl: expected a stream with classes, got language modelling")
        if context.model.head.kind == "multi":
            raise UserError("strategy.icarl: expected a head that all experiences share, got 'multi'")
        met: dict[int, str] = {}
        for experience in context.stream.experiences:
            for c in experience.classes:
                if c in met:
                    raise UserError(
                        "strategy.icarl: expected each class in one experience only (stream.scenario: class), got class "
                        f"{c} in '{met[c]}' and '{experience.name}'"
                    )
                met[c] = experience.name
        if self.size < len(met):
            raise UserError(f"strategy.icarl.size: expected at least {len(met)}, one for each class, got {self.size}")

    # -- training -------------------------------------------------------------------------------------------------

    def data(self, segment: Segment) -> list[Experience]:
        """The segment's experiences, and the exemplars as the experiences that they are from."""
        rows: dict[int, list[int]] = {}
        for experience, own in self.exemplars.values():
            if experience not in segment.experiences:
                rows.setdefault(experience, []).extend(own)
        every = self.context.stream.experiences
        old = [replace(every[e], train=replace(every[e].train, index=_index(rows[e]))) for e in sorted(rows)]
        return [*old, *(every[e] for e in segment.experiences)]

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        return [replace(phase, loss=self._loss) if phase.loss is None else phase for phase in phases]

    def _loss(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        head, context = self.context.model.head, self.context
        target = F.one_hot(head.targets(batch.y, batch.task), len(head)).to(output.logits.dtype)
        if self.old is not None:
            with torch.no_grad():
                answers = self.old(batch.x, context.route(batch.task)).logits.sigmoid()
            columns = self.old.head.columns(context.previous)  # outputs are only ever added behind
            columns = torch.arange(answers.shape[1], device=answers.device) if columns is None else columns
            target = target.index_copy(1, columns, answers.index_select(1, columns).to(target.dtype))
        logits, met = output.logits, head.columns(context.seen)
        if met is not None:
            logits, target = logits.index_select(1, met), target.index_select(1, met)
        found = {"icarl": F.binary_cross_entropy_with_logits(logits, target)}
        if self.l2:
            own = (p.square().sum() for p in context.model.parameters() if p.requires_grad)
            found["l2"] = self.l2 * sum(own, logits.new_zeros(()))
        return found

    # -- exemplars ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_experience(self, segment: Segment) -> None:
        each = self.size // len(self.context.seen)
        self.exemplars = {c: (e, rows[:each]) for c, (e, rows) in self.exemplars.items()}
        for e in segment.experiences:
            split = self.context.stream.experiences[e].train
            y = split.targets()
            assert y is not None
            for c in y.unique().tolist():
                rows = split.index[y == c]
                order = herd(self._features(split, e, rows), each)
                self.exemplars[c] = e, rows[order].tolist()
        self._compute_means()
        self.old = as_it_is(self.context)

    def _compute_means(self) -> None:
        """The mean feature of each output's exemplars, (U, D); NaN where there is none."""
        head = self.context.model.head
        self.means = torch.full((len(head), head.width), torch.nan)
        for c, (e, rows) in self.exemplars.items():
            mean = self._features(self.context.stream.experiences[e].train, e, _index(rows)).mean(0)
            place = int(head.targets(torch.tensor([c], device=self.context.device), e))
            self.means[place] = (self._scaled(mean.unsqueeze(0))[0]).float().cpu()

    def _features(self, split: Split, experience: int, rows: Tensor) -> Tensor:
        """Features (N, D), float64, of rows of the storage, as in evaluation."""
        own = replace(split, index=rows)
        return seen(self.context, own, experience, lambda x: self._of(x, experience).double())[0]

    def _of(self, x: Tensor, task: int | None) -> Tensor:
        return self._scaled(self.context.model(x, self.context.route(task)).features)

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalize else features

    # -- deciding -------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        """−‖x − m‖² for the mean m of each class's exemplars."""
        if not self.exemplars:
            return None
        features = self._of(x, task).float()
        means = self.means.to(features.device)
        logits = -(features.unsqueeze(1) - means).square().sum(2)
        return F.pad(logits.nan_to_num(nan=NEVER), (0, len(self.context.model.head) - len(means)), value=NEVER)

    def facts(self) -> dict[str, float]:
        sample = self.context.stream.experiences[0].train.x[0]
        count = sum(len(rows) for _, rows in self.exemplars.values())
        each = sample.numel() * sample.element_size() + 16  # with its class and experience
        held = count * each + self.means.numel() * self.means.element_size()
        return {"icarl/samples": float(count), "icarl/bytes": float(held)}

    def state_dict(self) -> dict[str, Any]:
        kept = {c: [e, list(rows)] for c, (e, rows) in self.exemplars.items()}
        return {"exemplars": kept, "means": self.means, "old": state_of(self.old)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exemplars = {c: (e, list(rows)) for c, (e, rows) in state["exemplars"].items()}
        self.means = state["means"]
        self.old = restored(self.context, state["old"])


def _index(rows: list[int]) -> Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64)
