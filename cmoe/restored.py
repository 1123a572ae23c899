"""A run's model as it was trained, for inference: from the run's last checkpoint or from an export."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe import checkpoint
from cmoe.assembly import component, make_model, make_objective, make_stream, seed_for
from cmoe.config.plan import Plan
from cmoe.errors import RunFailed, UserError, nearest
from cmoe.fit import Placement
from cmoe.inputs import rebuild, tells_experiences_apart
from cmoe.learners import Model
from cmoe.learners.evaluate import model_language
from cmoe.moe import RouteContext
from cmoe.plugins import Catalogue
from cmoe.rundir import RunFolder
from cmoe.strategies import Context, Strategy
from cmoe.strategies.deciding import Predict, deciding
from cmoe.streams import Stream

State = dict[str, Any]


@dataclass
class Restored:
    """A trained model with all that a prediction needs. It computes on the CPU, in the run's precision.

    Attributes:
        run_id: the run that trained it.
        plan: that run's configuration.
        stream: with or without samples, see `cmoe.inputs`.
        model: in evaluation mode.
        state: what it was restored from: `structure`, `model`, `seen` (classes), `learned` (experiences) and
            `strategies` (state of each that has its own decision rule, by position, else None).
        deciding: a strategy's own decision rule; None is the model's.
        infers: whether a strategy infers the task label.
        notes: what a user should know about it.
    """

    run_id: str
    plan: Plan
    stream: Stream
    model: Model
    placement: Placement
    state: State
    deciding: Predict | None = None
    infers: bool = False
    notes: list[str] = field(default_factory=list)

    # -- the task label -----------------------------------------------------------------------------------------

    def why_task(self) -> str | None:
        """Why a prediction needs the task label, in words; None when it does not."""
        if self.model.needs_task() and not self.infers:
            return "its router chooses experts by the task label"
        if self.model.head.kind == "multi" and self.stream.language:
            return "every task has outputs of its own"
        if self.plan.model["eval_outputs"] == "task":
            return "it was evaluated with the task label only (model.eval_outputs: task)"
        if tells_experiences_apart(self.stream):
            return "the stream transforms the inputs of each experience in its own way"
        if self.deciding is not None:
            probe = self.raw_like(1)
            x = self.inputs(probe, 0)
            with torch.inference_mode(), self.placement.forward():
                if self.deciding(x, None) is None:
                    return f"the strategy {self.plan.strategies} decides by the task label"
        return None

    def task(self, given: str | int | None, key: str = "--task") -> int | None:
        """The experience that a task label or index names; None where none is given and none is needed.

        Raises:
            UserError: it is needed, or there is no such task.
        """
        names = [e.name for e in self.stream.experiences]
        choices = ", ".join(f"{i} ({n})" if n != str(i) else n for i, n in enumerate(names[:12]))
        choices += ", ..." if len(names) > 12 else ""
        if given is None or given == "":
            reason = self.why_task()
            if reason:
                raise UserError(f"{key}: expected one of {choices}, as {reason}")
            return None
        if str(given) in names:
            return names.index(str(given))
        if str(given).isdecimal() and int(given) < len(names):
            return int(given)
        raise UserError(f"{key}: expected one of {choices}, got '{given}'{nearest(str(given), names)}")

    # -- predictions --------------------------------------------------------------------------------------------

    def raw_like(self, count: int) -> Tensor:
        """`count` blank samples as the stream stores them."""
        x = self.stream.experiences[0].train.x
        return torch.zeros((count, *x.shape[1:]), dtype=x.dtype)

    def inputs(self, raw: Tensor, task: int | None) -> Tensor:
        """Raw samples (B, ...) as the model's input."""
        x = self.stream.transform(raw, task or 0, train=False, generator=None)
        return x.to(self.placement.dtype) if x.is_floating_point() else x

    def logits(self, raw: Tensor, task: int | None) -> Tensor:
        """Logits (B, U) of all outputs for raw samples (B, ...), by the run's own decision rule."""
        with torch.inference_mode(), self.placement.forward():
            x = self.inputs(raw, task)
            own = self.deciding(x, task) if self.deciding is not None else None
            return own if own is not None else self.model(x, RouteContext(task=task)).logits

    def columns(self, task: int | None) -> Tensor:
        """Outputs that a prediction may choose from, as the run's evaluation did."""
        head = self.model.head
        if task is not None:
            chosen = head.columns(self.stream.experiences[task].classes, task)
        else:
            chosen = head.columns(self.state["seen"]) if self.plan.model["eval_outputs"] == "seen" else None
        return torch.arange(len(head)) if chosen is None else chosen

    def classes(self, raw: Tensor, task: int | None, top: int = 1) -> list[list[tuple[int, float]]]:
        """The `top` most probable classes of each sample with their probabilities, best first.

        Args:
            raw: (N, ...) samples as the stream stores them.
            task: see `task`.
            top: how many classes, at most.
        """
        columns = self.columns(task)
        if not len(columns):
            raise UserError(f"run {self.run_id}: its model has no outputs for this task, it was not learned yet")
        units = self.model.head.unit_classes().index_select(0, columns)
        found: list[list[tuple[int, float]]] = []
        for part in raw.split(self.plan.evaluation["batch_size"]):
            logits = self.logits(part, task).index_select(1, columns)
            # max, as in the evaluation of a run, decides the first: topk may order equal ones otherwise
            shares = F.softmax(logits.float(), dim=1)
            first = shares.max(1).indices
            order = shares.argsort(dim=1, descending=True, stable=True)[:, : top * len(self.model.head.blocks)]
            for row, best, ranks in zip(shares.tolist(), first.tolist(), order.tolist(), strict=True):
                # a multi-head without the task label may have several outputs of one class
                chosen: dict[int, float] = {}
                for unit in [best, *(r for r in ranks if r != best)]:
                    chosen.setdefault(int(units[unit]), row[unit])
                    if len(chosen) >= top:
                        break
                found.append(list(chosen.items()))
        return found

    def language(self, text: bytes, task: int | None) -> tuple[float, float]:
        """Bits per byte and the share of bytes that were predicted right, of a text that is not empty."""
        from cmoe.streams.text import windows

        raw = torch.from_numpy(windows(text, self.stream.input_shape[0]))
        batches = []
        for part in raw.split(self.plan.evaluation["batch_size"]):
            tokens = self.inputs(part, task)
            batches.append((tokens[:, :-1], tokens[:, 1:]))
        predict = self.deciding
        with self.placement.forward():
            arrays = model_language(self.model, batches, task or 0, predict, self.placement.device).arrays
        count = int(arrays["tokens"].sum())
        bits = float(arrays["nll"].astype("float64").sum()) / math.log(2) / count
        return bits, int(arrays["correct"].sum()) / count

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.stream.class_names


def of_run(folder: RunFolder, plugins: Sequence[str | Path] = (), data: Any = None) -> Restored:
    """The model of a run's last checkpoint.

    The stream is taken from what the run wrote down; where that is not enough, its data is opened.

    Args:
        folder: the run's.
        plugins: further folders with plugins.
        data: where data sets are; default is where they were when the run began.

    Raises:
        UserError: the run has no checkpoint, or did not keep its model.
    """
    facts = folder.facts()
    notes = []
    try:
        saved = checkpoint.load(folder.state)
    except RunFailed as error:
        raise UserError(f"run {folder.id}: {error}") from error
    if saved is None:
        raise UserError(f"run {folder.id}: has no trained model yet (it is {facts.get('status', 'unknown')})")
    trained, total = int(saved["position"]["segment"]), facts.get("segments")
    if facts.get("status") == "FINISHED" and total is not None and trained < total:
        raise UserError(
            f"run {folder.id}: its model was not kept (a strategy that runs Avalanche's own loop); there is none to use"
        )
    if facts.get("status") != "FINISHED":
        notes.append(f"run {folder.id} is {facts.get('status')}: this is its model after {trained} experiences")
    config = facts["config"]
    here = [p for p in config.get("plugins", []) if Path(p).expanduser().is_dir()]
    catalogue = Catalogue([*here, *plugins])
    plan = unchecked(config)
    known = facts.get("inputs")
    if known and known["transform"] is not None and known["fingerprint"] == saved["data"]:
        stream = rebuild(known)
    else:
        stream = _opened(folder, plugins, data)
    state = {
        "structure": saved["structure"],
        "model": saved["model"],
        "seen": list(saved["seen"]),
        "learned": list(range(saved["rows"])),
        "strategies": list(saved["strategies"]),
    }
    return assemble(folder.id, plan, catalogue, stream, state, notes)


def assemble(
    run_id: str, plan: Plan, catalogue: Catalogue, stream: Stream, state: State, notes: Sequence[str] = ()
) -> Restored:
    """A model from its parts; `state` as in `Restored`."""
    placement = Placement("cpu", plan.trainer["precision"])

    def build(purpose: str) -> Model:
        return make_model(plan, catalogue, stream, purpose).to(placement.device, placement.dtype)

    model = build("model")
    model.restore_structure(state["structure"])
    model.load_state_dict(state["model"])
    model.to(placement.device, placement.dtype).eval()
    restored = Restored(run_id, plan, stream, model, placement, dict(state), notes=list(notes))
    kept: list[Any] = []
    deciders: list[Strategy] = []
    for spec, saved in zip(plan.strategy, state["strategies"], strict=True):
        # the others' states (buffers of samples, old networks) are for training alone
        kind = cast("type[Strategy]", catalogue.find("strategy", spec["name"]).load())
        decides = kind.owns_predict or kind.infers_task
        kept.append(saved if decides else None)
        if decides:
            strategy = component(catalogue, "strategy", spec)
            strategy.setup(_context(restored, build))
            strategy.load_state_dict(saved)
            deciders.append(strategy)
    restored.deciding, restored.infers = deciding(deciders), any(s.infers_task for s in deciders)
    restored.state["strategies"] = kept
    return restored


def _context(restored: Restored, build: Any) -> Context:
    plan = restored.plan
    return Context(
        stream=restored.stream,
        model=restored.model,
        objective=make_objective(plan, restored.stream, restored.model.head),
        seed=lambda purpose: seed_for(plan.seed, purpose),
        fresh_model=build,
        device=restored.placement.device,
        event=lambda *_: None,
        options=plan.to_dict(),
        seen=list(restored.state["seen"]),
        previous=list(restored.state["seen"]),
    )


def unchecked(config: dict[str, Any]) -> Plan:
    """The plan of a resolved configuration, taken at its word: the components of training need not be here."""
    sections = {n: config[n] for n in Plan.__dataclass_fields__ if n not in ("run", "code", "sources", "plugins")}
    run = {k: config[k] for k in ("experiment", "seed", "label")}
    return Plan(run=run, plugins=list(config.get("plugins", [])), **sections)


def _opened(folder: RunFolder, plugins: Sequence[str | Path], data: Any) -> Stream:
    from cmoe.api import data_of_run, plan_of_run

    plan, catalogue = plan_of_run(folder, plugins)
    return make_stream(plan, catalogue, data or data_of_run(folder))
