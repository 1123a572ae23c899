"""Rows of the matrix: the model on every experience's samples, as raw predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from cmoe.config.plan import Plan
from cmoe.fit import Placement
from cmoe.learners import Model
from cmoe.learners.evaluate import Outputs, Predictions, classify, model_language
from cmoe.metrics import Column, Record
from cmoe.strategies import Strategy
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
        load: tokens per expert by experience, layer and expert id, of the last row.
        routes: where the tokens of learned experiences went, by experience and layer, of the last row.
    """

    plan: Plan
    stream: Stream
    model: Model
    placement: Placement
    strategies: Sequence[Strategy]
    load: dict[int, Load] = field(default_factory=dict)
    routes: dict[int, Routes] = field(default_factory=dict)

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
        self.load, self.routes = {}, {}
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
                self.load[j], self.routes[j] = predictions.load, predictions.routes
        self.model.train()
        return row

    def _predict(self, experience: Experience, seen: Sequence[int]) -> Predictions:
        evaluation = self.plan.evaluation
        own = [s.predict for s in self.strategies if s.owns_predict]
        predict = own[0] if own else None
        batches = [
            (b.x if not b.x.is_floating_point() else b.x.to(self.placement.dtype), b.y)
            for b in evaluation_batches(
                self.split(experience), experience.index, self.stream.transform, evaluation["batch_size"]
            )
        ]
        task, device = experience.index, self.placement.device
        if self.stream.language:
            return model_language(self.model, batches, task, predict, device)
        return classify(self.model, batches, task, self._outputs(experience, seen), predict, device)

    def _outputs(self, experience: Experience, seen: Sequence[int]) -> Outputs:
        head, mode = self.model.head, self.plan.model["eval_outputs"]
        free: Tensor | None = head.columns(seen) if mode == "seen" else None
        # the same classes in every experience: the label tells something only where the model uses it
        labelled = self.stream.scenario != "domain" or head.kind == "multi" or self.model.needs_task()
        labelled = labelled or any(s.owns_predict for s in self.strategies)
        return Outputs(
            free=free,
            task=head.columns(experience.classes, experience.index),
            report_free=mode != "task" and len(head) > 0 and not self.stream.many_labels,
            report_task=labelled and len(head) > 0,
        )


def router_drift(before: Routes, after: Routes) -> float | None:
    """Share of an experience's tokens whose best expert is another one, mean over layers; None without any routing."""
    changed = [
        float((best != after[layer]).double().mean())
        for layer, best in before.items()
        if layer in after and len(best) and len(best) == len(after[layer])
    ]
    return float(np.mean(changed)) if changed else None
