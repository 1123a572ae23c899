"""Rows of the matrix: the model on every experience's samples, as raw predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from cmoe.config.plan import Plan
from cmoe.fit import Placement
from cmoe.learners import Model
from cmoe.learners.evaluate import Outputs, Predictions, Traffic, classify, model_language
from cmoe.metrics import Column, Record
from cmoe.strategies import Strategy
from cmoe.strategies.deciding import deciding
from cmoe.streams import Experience, Split, Stream, evaluation_batches

Load = dict[str, dict[int, int]]
Routes = dict[str, Tensor]


@dataclass
class Evaluator:
    """Evaluates rows of one run.

    Attributes:
        plan: the run's.
        stream: the run's.
        model: as it is at the moment of a call.
        placement: where and in what precision.
        strategies: one of them may have its own decision rule.
        traffic: where the tokens of learned experiences went, by experience, in the last row.
    """

    plan: Plan
    stream: Stream
    model: Model
    placement: Placement
    strategies: Sequence[Strategy]
    traffic: dict[int, Traffic] = field(default_factory=dict)

    @property
    def load(self) -> dict[int, Load]:
        """Tokens per expert by experience, layer and expert id, of the last row."""
        return {j: traffic.load for j, traffic in self.traffic.items()}

    @property
    def routes(self) -> dict[int, Routes]:
        """The best expert of each token by experience and layer, of the last row."""
        return {j: traffic.routes for j, traffic in self.traffic.items()}

    def split(self, experience: Experience) -> Split:
        """The samples that rows are evaluated on."""
        return experience.test if self.plan.evaluation["split"] == "test" else experience.validation

    def new_record(self) -> Record:
        """An empty record of this stream."""
        targets = []
        for experience in self.stream.experiences:
            split = self.split(experience)
            y = split.targets()
            if y is None:
                padding = 256
                y = (split.raw()[:, 1:] != padding).sum(1)
            targets.append(np.asarray(y.numpy(), dtype=np.int32))
        return Record(
            kind="language" if self.stream.language else "classification",
            names=[e.name for e in self.stream.experiences],
            classes=[tuple(e.classes) for e in self.stream.experiences],
            targets=targets,
        )

    def row(self, columns: Sequence[int], seen: Sequence[int], learned: Sequence[int]) -> dict[int, Column]:
        """The columns of a row.

        Args:
            columns: experiences to evaluate on.
            seen: classes known so far.
            learned: experiences trained so far.
        """
        self.traffic = {}
        row = {}
        self.model.eval()
        for j in columns:
            experience = self.stream.experiences[j]
            if len(self.split(experience)) == 0:
                continue
            with self.placement.forward():
                predictions = self._predict(experience, seen)
            row[j] = Column(**predictions.arrays)
            if j in learned:
                self.traffic[j] = predictions.traffic
        self.model.train()
        return row

    def _predict(self, experience: Experience, seen: Sequence[int]) -> Predictions:
        predict = deciding(self.strategies)
        batches = self.batches(experience, self.split(experience), self.plan.evaluation["batch_size"])
        task, device = experience.index, self.placement.device
        closely = self.plan.evaluation["diagnostics"] != "none"
        if self.stream.language:
            return model_language(self.model, batches, task, predict, device, closely)
        return classify(self.model, batches, task, self.outputs(experience, seen), predict, device, closely)

    def batches(self, experience: Experience, split: Split, size: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of some of an experience's samples, as the model gets them."""
        return [
            (b.x if not b.x.is_floating_point() else b.x.to(self.placement.dtype), b.y)
            for b in evaluation_batches(split, experience.index, self.stream.transform, size)
        ]

    def outputs(self, experience: Experience, seen: Sequence[int]) -> Outputs:
        """What a prediction on an experience may choose from, with classes `seen` known so far."""
        head, mode = self.model.head, self.plan.model["eval_outputs"]
        free: Tensor | None = head.columns(seen) if mode == "seen" else None
        # the same classes in every experience: the label tells something only where the model uses it
        labelled = self.stream.scenario != "domain" or head.kind == "multi" or self.model.needs_task()
        labelled = labelled or any(s.owns_predict or s.infers_task for s in self.strategies)
        return Outputs(
            free=free,
            task=head.columns(experience.classes, experience.index),
            report_free=mode != "task" and len(head) > 0 and not self.stream.many_labels,
            report_task=labelled and len(head) > 0,
        )


def router_drifts(before: Mapping[int, Routes], after: Mapping[int, Routes]) -> dict[int, float]:
    """`router_drift` of every experience that both rows know and that has any."""
    moved = {j: router_drift(before[j], after[j]) for j in before if j in after}
    return {j: drift for j, drift in moved.items() if drift is not None}


def router_drift(before: Routes, after: Routes) -> float | None:
    """Share of an experience's tokens whose best expert is another one, mean over layers; None without any routing."""
    changed = [
        float((best != after[layer]).double().mean())
        for layer, best in before.items()
        if layer in after and len(best) and len(best) == len(after[layer])
    ]
    return float(np.mean(changed)) if changed else None
