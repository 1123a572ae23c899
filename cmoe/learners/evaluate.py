"""One column of a row: raw predictions of a model on one experience's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.learners.model import Model
from cmoe.learners.objective import PADDING
from cmoe.moe import RouteContext, Routing
from cmoe.moe.diagnostics import Flow

Predict = Callable[[Tensor, int | None], Tensor | None]
ROUTES = 2048  # tokens of an experience whose routes are compared from row to row; they lie in every checkpoint
Batches = Iterable[tuple[Tensor, Tensor]]


class Traffic:
    """What the routings of an experience's batches come to.

    Attributes:
        flows: load and what else was measured, by layer.
        kinds: of layers that do not assign tokens to experts, the kind of their routing.

    Args:
        closely: whether the routers' entropies are measured.
    """

    def __init__(self, closely: bool = False) -> None:
        self.closely = closely
        self.flows: dict[str, Flow] = {}
        self.kinds: dict[str, str] = {}
        self._routes: dict[str, list[Tensor]] = {}

    def add(self, routings: dict[str, Routing]) -> None:
        """Take in a batch."""
        for name, routing in routings.items():
            if routing.kind != "sparse":
                self.kinds[name] = routing.kind
                continue
            flow = Flow.of(routing, self.closely)
            self.flows[name] = self.flows[name] + flow if name in self.flows else flow
            kept = self._routes.setdefault(name, [])
            room = ROUTES - sum(map(len, kept))
            if room > 0:
                best = routing.weights[:room].argmax(1, keepdim=True)
                kept.append(routing.ids[:room].gather(1, best).squeeze(1).to(torch.int16).cpu())

    @property
    def load(self) -> dict[str, dict[int, int]]:
        """How many tokens went to each expert, by layer and expert id."""
        return {name: flow.load for name, flow in self.flows.items()}

    @property
    def routes(self) -> dict[str, Tensor]:
        """By layer, the expert with the highest weight of each of the first `ROUTES` tokens (int16, −1: none)."""
        return {name: torch.cat(parts) for name, parts in self._routes.items()}


@dataclass
class Predictions:
    """What a model said, in the order of the samples.

    Attributes:
        arrays: for classes `pred`, `confidence` (chosen without the task label), `task_pred`, `task_confidence`
            (chosen among the task's classes); −1 where there is no such prediction. For language `nll` (nats),
            `correct`, `tokens`, each one a sequence.
        traffic: where the tokens went.
    """

    arrays: dict[str, np.ndarray]
    traffic: Traffic


@dataclass(frozen=True)
class Outputs:
    """Which outputs a prediction may choose from.

    Attributes:
        free: columns without the task label; None is all.
        task: columns with the task label; None is all.
        report_free: whether a prediction without the task label is made at all.
        report_task: whether one with the task label is.
    """

    free: Tensor | None
    task: Tensor | None
    report_free: bool = True
    report_task: bool = True


def classify(
    model: Model,
    batches: Batches,
    task: int,
    outputs: Outputs,
    predict: Predict | None,
    device: torch.device,
    closely: bool = False,
) -> Predictions:
    """Predictions for classification; the model must be in evaluation mode.

    Args:
        model: backbone and head.
        batches: inputs (B, ...) and classes (B,), of one experience only.
        task: that experience's task label.
        outputs: what predictions may choose from.
        predict: a strategy's own decision rule.
        device: where the model is.
        closely: whether the routers' entropies are measured.
    """
    classes = model.head.unit_classes()
    needs_task = model.needs_task()
    parts: dict[str, list[Tensor]] = {"pred": [], "confidence": [], "task_pred": [], "task_confidence": []}
    traffic = Traffic(closely)
    with torch.inference_mode():
        for x, _ in batches:
            x = x.to(device)
            with_task = predict(x, task) if predict else None
            without = predict(x, None) if predict else None
            if with_task is None:
                output = model(x, RouteContext(task=task))
                traffic.add(output.routings)
                with_task = output.logits
                if predict is None and not needs_task:
                    without = with_task  # nothing that looks at the label: one forward serves both
            _choose(parts, "", without if outputs.report_free else None, outputs.free, classes, x.shape[0])
            _choose(parts, "task_", with_task if outputs.report_task else None, outputs.task, classes, x.shape[0])
    arrays = {k: torch.cat(v).cpu().numpy() for k, v in parts.items()}
    for prefix in ("", "task_"):
        if (arrays[f"{prefix}pred"] < 0).all():  # no such prediction exists here
            del arrays[f"{prefix}pred"], arrays[f"{prefix}confidence"]
    return Predictions(arrays, traffic)


def _choose(
    parts: dict[str, list[Tensor]],
    prefix: str,
    logits: Tensor | None,
    columns: Tensor | None,
    classes: Tensor,
    count: int,
) -> None:
    """Append the predicted class and its probability among the allowed outputs."""
    if logits is None or (columns is not None and len(columns) == 0):
        pred, confidence = torch.full((count,), -1, dtype=torch.int32), torch.zeros(count)
    else:
        if columns is not None:
            logits = logits.index_select(1, columns)
        best, unit = F.softmax(logits.float(), dim=1).max(1)
        unit = unit if columns is None else columns.index_select(0, unit)
        pred, confidence = classes.index_select(0, unit).int().cpu(), best.cpu()
    parts[f"{prefix}pred"].append(pred)
    parts[f"{prefix}confidence"].append(confidence)


def model_language(
    model: Model,
    batches: Batches,
    task: int,
    predict: Predict | None,
    device: torch.device,
    closely: bool = False,
) -> Predictions:
    """Negative log-likelihood in nats, right next bytes and number of bytes of each sequence.

    A multi-head predicts with the task's own block, or where it has none yet with the first.

    Args:
        model: backbone and head.
        batches: bytes (B, L) and next bytes (B, L), of one experience only.
        task: that experience's task label.
        predict: a strategy's own decision rule.
        device: where the model is.
        closely: whether the routers' entropies are measured.
    """
    parts: dict[str, list[Tensor]] = {"nll": [], "correct": [], "tokens": []}
    traffic = Traffic(closely)
    tasks = model.head.block_tasks
    block = tasks.index(task) if task in tasks else 0
    with torch.inference_mode():
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            logits = predict(x, task) if predict else None
            if logits is None:
                output = model(x, RouteContext(task=task))
                traffic.add(output.routings)
                logits = output.logits
            if len(tasks) > 1:
                logits = logits[..., block * 256 : (block + 1) * 256]
            valid = y != PADDING
            nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=PADDING, reduction="none")
            parts["nll"].append(nll.view(y.shape).sum(1).cpu())
            parts["correct"].append(((logits.argmax(-1) == y) & valid).sum(1).int().cpu())
            parts["tokens"].append(valid.sum(1).int().cpu())
    kinds = {"nll": np.float32, "correct": np.int32, "tokens": np.int32}
    return Predictions({k: torch.cat(v).numpy() if v else np.zeros(0, kinds[k]) for k, v in parts.items()}, traffic)
