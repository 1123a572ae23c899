"""The state of one run: everything that `cmoe.runner.train` walks through, saves and restores."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cmoe import carried, checkpoint, snapshot
from cmoe.assembly import component, make_model, make_objective, make_stream, seed_for
from cmoe.config.plan import Plan
from cmoe.diagnosis import Document, diagnose
from cmoe.environment import environment
from cmoe.errors import RunFailed, UserError, one_line
from cmoe.evaluation import Evaluator, Load, Routes, router_drifts
from cmoe.fit import Placement, fit
from cmoe.inputs import describe
from cmoe.learners import Learner, Model
from cmoe.moe import ParameterChange
from cmoe.outputs import Outputs
from cmoe.plugins import Catalogue
from cmoe.progress import Progress
from cmoe.reporting import Reporter
from cmoe.rundir import RunFolder, now, write_whole
from cmoe.snapshot import Position
from cmoe.strategies import Avalanche, Context, Phase, Segment, Strategy
from cmoe.streams import BatchScheduler, DataFolder
from cmoe.timeline import Timeline

SMALL = 2_000_000  # parameters; below it a second thread costs more than it gives


class Interrupted(Exception):
    """The user asked to stop; the state is saved."""


@dataclass
class Session:
    """One run, new or going on.

    Attributes:
        plan: the checked configuration.
        folder: where the run lives.
        catalogue: components by name.
        data: where data sets are.
        reporter: told what happens.
        anyway: go on although the machine or the versions changed.
        stop: asked between chunks whether the user wants to stop.
    """

    plan: Plan
    folder: RunFolder
    catalogue: Catalogue
    data: DataFolder
    reporter: Reporter = field(default_factory=Reporter)
    anyway: bool = False
    stop: Any = None

    # -- the beginning ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Build everything, then restore the last checkpoint or evaluate the initial model."""
        plan = self.plan
        self.started = time.monotonic()
        self.stream = make_stream(plan, self.catalogue, self.data)
        self.placement = Placement(_accelerator(plan.trainer["accelerator"]), plan.trainer["precision"])
        self.outputs = Outputs(plan, self.stream)
        self.model = self._build("model")
        self.threads = self._set_threads()
        checkpoint.seed_generators(seed_for(plan.seed, "global"))
        self.objective = make_objective(plan, self.stream, self.model.head)
        self.timeline = Timeline()
        self.context = self._context()
        self.strategies: list[Strategy] = [self._strategy(spec) for spec in plan.strategy]
        self.native = next((s for s in self.strategies if isinstance(s, Avalanche)), None)
        self.segments = self._segments()
        self.scheduler_options = component(self.catalogue, "scheduler", plan.scheduler)
        self.optimizer_options = component(
            self.catalogue, "optimizer", {k: v for k, v in plan.optimizer.items() if k != "reset"}
        )
        self.evaluator = Evaluator(plan, self.stream, self.model, self.placement, self.strategies)
        self.environment = environment(self.threads, str(self.placement.device), plan.code)
        self.position = Position()
        self.carried: dict[str, dict[str, Any]] = {}
        self.names: dict[torch.nn.Parameter, str] = {}  # by which `carried` knows them
        self.loads: dict[int, dict[int, Load]] = {}
        self.routes: dict[int, Routes] = {}  # of the last row
        self.drift: float | None = None
        self.diagnosis: Document | None = None  # of the row just evaluated
        self.saved = 0
        self.earlier_seconds = 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        self.phase_in_progress: tuple[dict[str, Any], int] | None = None  # its optimizer's state and its steps
        self.learner = Learner(
            self.model,
            self.objective,
            self.strategies,
            clip_norm=plan.trainer["clip_norm"],
            clip_value=plan.trainer["clip_value"],
            log=self._log_losses,
            log_every=plan.trainer["log_every"],
        )
        state = None if self.native is not None else checkpoint.load(self.folder.state)
        if state is None:
            self.progress = self._progress()
            self._start()
        else:
            snapshot.restore(self, state)
            # Nothing refuses the run any more: from now on it is what its plan says (an extended one's is longer).
            self.folder.update(
                status="RUNNING",
                error=None,
                inputs=describe(self.stream),
                data_root=str(self.data.root),
                config=plan.to_dict(),
                config_hash=plan.hash,
            )
            write_whole(self.folder.path / "config.yaml", plan.to_yaml())
            self.progress = self._progress()
            self.progress.resume(state["wal"])
            # last: building and loading may draw random numbers
            checkpoint.restore_generators(state["generators"])
        self.last_save = time.monotonic()
        facts = {
            "segments": len(self.segments),
            "parameters": self.model.parameter_counts()[0],
            "device": f"{self.placement.device}, {self.threads} thread{'s' * (self.threads > 1)}",
        }
        self.reporter.started(self.folder.id, facts)

    def _progress(self) -> Progress:
        return Progress(self.folder, self.plan, self.stream, self.environment, self.reporter.note)

    def _start(self) -> None:
        self.progress.start()
        self.folder.update(status="RUNNING", error=None, environment=self.environment, data=self.stream.fingerprint)
        self.folder.update(inputs=describe(self.stream))
        self.record = self.evaluator.new_record()
        self.record.save_targets(self.folder.rows)
        if self.plan.evaluation["initial"] and len(self.model.head):
            self.record.add_row(-1, self.evaluator.row(self._columns(), [], []))
            self.record.save_row(self.folder.rows, -1)
            self.progress.baseline(self.record)
        self.save()

    def _build(self, purpose: str) -> Model:
        model = make_model(self.plan, self.catalogue, self.stream, purpose)
        self.outputs.begin(model.head, purpose)
        return model.to(self.placement.device, self.placement.dtype)

    def _context(self) -> Context:
        plan = self.plan
        return Context(
            stream=self.stream,
            model=self.model,
            objective=self.objective,
            seed=lambda purpose: seed_for(plan.seed, purpose),
            fresh_model=self._build,
            device=self.placement.device,
            event=self._event,
            options=plan.to_dict(),
            changed=self._changed,
        )

    def _event(self, kind: str, layer: str, experts: Sequence[int], experience: int, into: int | None = None) -> None:
        self.timeline.add(kind, layer, experts, experience, after=self.position.phase is not None, into=into)

    def _changed(self, change: ParameterChange) -> None:
        """The optimizer's state follows experts that were split, merged or copied."""
        if self.plan.optimizer["reset"] == "never":
            self.carried = carried.follow(self.carried, self.names, self.model, change)
            self.names = carried.names(self.model)

    def _strategy(self, spec: dict[str, Any]) -> Strategy:
        """A strategy, set up.

        Raises:
            UserError: it cannot be made; a plugin's may raise anything.
        """
        try:
            strategy = component(self.catalogue, "strategy", spec)
            strategy.setup(self.context)
        except (UserError, RunFailed):
            raise
        except Exception as error:
            raise UserError(f"strategy {spec['name']}: {one_line(error)}") from error
        return strategy

    def _set_threads(self) -> int:
        """The threads that the run began with; a new one takes what the plan says, else one for a small model."""
        recorded = self.folder.facts().get("environment", {}).get("threads")
        wanted = recorded or self.plan.trainer["threads"]
        if not wanted:
            small = sum(p.numel() for p in self.model.parameters()) < SMALL
            most = int(os.environ.get("CMOE_MAX_THREADS", 0)) or os.cpu_count() or 1
            wanted = 1 if small else most
        torch.set_num_threads(wanted)
        return wanted

    def _segments(self) -> list[Segment]:
        have = len(self.stream.experiences)
        limit = self.plan.stream["limit"] or have
        if limit > have:
            raise UserError(f"stream.limit: expected at most {have}, all experiences of the stream (0), got {limit}")
        groups = [tuple(e for e in group if e < limit) for group in self.stream.segments]
        segments = [Segment(i, group) for i, group in enumerate(g for g in groups if g)]
        for strategy in self.strategies:
            segments = strategy.segments(segments)
        return segments

    # -- the walk -----------------------------------------------------------------------------------------------

    @property
    def inside_segment(self) -> bool:
        """Whether the run was restored in the middle of a segment."""
        return self.position.phase is not None

    def remaining(self) -> Iterator[Segment]:
        """Segments that are not complete."""
        first = self.position.segment
        for segment in self.segments[first:]:
            name = ", ".join(self.stream.experiences[e].name for e in segment.experiences)
            self.reporter.segment(segment.number, len(self.segments), name, self.inside_segment)
            yield segment

    def begin(self, segment: Segment) -> None:
        """Make the segment's classes known and give them outputs."""
        self.segment_seconds = time.monotonic()
        known = set(self.context.seen)
        new = [c for e in segment.experiences for c in self.stream.experiences[e].classes]
        self.context.previous = list(self.context.seen)
        self.context.seen += [c for c in dict.fromkeys(new) if c not in known]
        self.outputs.grow(self.model.head, segment.experiences, new, self.context.seeded)

    def announce(self, segment: Segment) -> None:
        """Track what the strategies made of the model for this segment."""
        self.progress.structure(self.model, segment.last)

    def remaining_phases(self, segment: Segment) -> Iterator[tuple[int, Phase]]:
        """The segment's phases that are not complete."""
        self.segment_seconds = getattr(self, "segment_seconds", time.monotonic())
        self.objective.begin(self.context.seen, self._current(segment))
        phases = [Phase()]
        for strategy in self.strategies:
            phases = strategy.phases(segment, phases)
        yield from list(enumerate(phases))[self.position.phase or 0 :]

    def _current(self, segment: Segment) -> list[int]:
        return list(dict.fromkeys(c for e in segment.experiences for c in self.stream.experiences[e].classes))

    def fit(self, segment: Segment, number: int, phase: Phase) -> None:
        """One phase of a segment, from its beginning or from where it was interrupted."""
        plan = self.plan
        data = [d for d in (s.data(segment) for s in self.strategies) if d is not None]
        experiences = data[0] if data else [self.stream.experiences[e] for e in segment.experiences]
        parts = [p for e in experiences for p in e.parts or ()] or None
        self.loader = BatchScheduler(
            [(e.train, e.index) for e in experiences],
            self.stream.transform,
            batch_size=plan.trainer["batch_size"],
            epochs=phase.epochs or plan.trainer["epochs"],
            max_steps=plan.trainer["max_steps"],
            chunk=plan.trainer["chunk"],
            seed=plan.seed,
            experience=segment.last,
            phase=number,
            parts=parts,
        )
        parameters = list(phase.parameters()) if phase.parameters else self._trainable()
        if not parameters:
            raise RunFailed(f"experience {segment.last}: nothing is left to train, everything is frozen")
        self.optimizer = self.optimizer_options.build(parameters)
        total = self.loader.steps
        constant = plan.scheduler["name"] == "constant"
        rates = None if constant else lambda step: self.scheduler_options.factor(step, total)
        self.learner.begin_phase(self.optimizer, rates, phase.loss, phase.hooks, phase.objective)
        if self.position.phase == number:
            assert self.position.loader is not None
            self.loader.load_state_dict(self.position.loader)
            assert self.phase_in_progress is not None
            optimizer_state, self.learner.phase_steps = self.phase_in_progress
            self.optimizer.load_state_dict(optimizer_state)
        elif plan.optimizer["reset"] == "never":
            carried.take(self.carried, self.model, self.optimizer, parameters)
        self.position = Position(segment.number, number, None)
        self.model.train()
        for strategy in self.strategies:
            strategy.before_phase(segment, phase)
        try:
            fit(self.learner, self.loader, self.placement, lambda: self._tick(phase))
        except FloatingPointError as error:
            raise RunFailed(f"experience {segment.last}: {error}; a smaller optimizer.lr may help") from error
        self.model.to(self.placement.device)
        if plan.optimizer["reset"] == "never":
            self.carried = carried.keep(self.carried, self.model, self.optimizer)
            self.names = carried.names(self.model)
        self.optimizer = None

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _tick(self, phase: Phase) -> None:
        """Between two chunks."""
        self.reporter.progress(phase.name, self.learner.phase_steps, self.loader.steps, self.progress.last_loss)
        if self.stop is not None and self.stop():
            self.save(inside=True)
            raise Interrupted
        if time.monotonic() - self.last_save > self.plan.checkpoint["every_seconds"]:
            self.save(inside=True)

    def train_natively(self, segment: Segment) -> None:
        """A segment in Avalanche's own loop."""
        assert self.native is not None
        if self.optimizer is None:
            self.optimizer = self.optimizer_options.build(self._trainable())
        self.segment_seconds = time.monotonic()
        self.native.train(segment, self.optimizer)
        if self.stop is not None and self.stop():
            raise Interrupted

    # -- the end of a segment -----------------------------------------------------------------------------------

    def _columns(self) -> list[int]:
        return list(range(len(self.stream.experiences)))

    def evaluate(self, segment: Segment) -> None:
        """The segment's row of the matrix."""
        self.train_seconds = time.monotonic() - self.segment_seconds
        self.drift = self.diagnosis = None
        last = segment.number == len(self.segments) - 1
        if not last and (segment.number + 1) % self.plan.evaluation["every"]:
            return
        learned = sorted({e for s in self.segments[: segment.number + 1] for e in s.experiences})
        columns = learned if self.plan.evaluation["rows"] == "seen" else self._columns()
        self.record.add_row(segment.last, self.evaluator.row(columns, self.context.seen, learned))
        self.record.save_row(self.folder.rows, segment.last)
        self.loads[segment.last] = self.evaluator.load
        now = self.evaluator.routes
        moved = router_drifts(self.routes, now)
        self.drift = sum(moved.values()) / len(moved) if moved else None
        self.routes = now
        seed = seed_for(self.plan.seed, f"diagnostics of row {segment.last}")
        began = time.monotonic()
        self.diagnosis = diagnose(self.evaluator, segment.last, self.context.seen, moved, seed)
        self.diagnosis_seconds = time.monotonic() - began

    def end(self, segment: Segment) -> None:
        """Track the row and save the exact state."""
        facts = {k: v for s in self.strategies for k, v in s.facts().items()}
        facts["time/train_seconds"] = self.train_seconds
        if self.drift is not None:
            facts["router/drift"] = self.drift
        if self.diagnosis is not None:
            facts |= self.progress.diagnosed(self.diagnosis)
            facts["time/diagnostics_seconds"] = self.diagnosis_seconds
        values = self.progress.row(segment.last, self.record, facts, self._unseen_masked())
        self.reporter.row(segment.last, values)
        del self.segment_seconds
        self.position = Position(segment.number + 1)
        if self.native is None:
            self.save()

    def _unseen_masked(self) -> bool:
        return self.plan.model["eval_outputs"] == "seen" or self.model.head.kind == "growing"

    def close(self) -> dict[str, Any]:
        """Figures, tables and the end of the run."""
        seconds = self.earlier_seconds + time.monotonic() - self.started
        held = sum(s.parameters() for s in self.strategies)
        facts = self.progress.finish(
            self.record, self.model, self.timeline, self.loads, seconds, self._unseen_masked(), held
        )
        if self.native is not None:
            self.save()  # never resumed from, but predicted with
        # nothing of this is delivered before the run counts as finished: a kill until then repeats it unseen, and one
        # after it finds the log complete
        self.progress.end("FINISHED")
        wal = self.progress.sync()
        facts = self.folder.update(status="FINISHED", finished=now(), segments=len(self.segments), **facts)
        self.progress.commit(wal)
        self.progress.close()
        self.reporter.finished(facts)
        return facts

    # -- saving -------------------------------------------------------------------------------------------------

    def save(self, inside: bool = False) -> None:
        """The exact state, durable; what was tracked until now may be delivered."""
        self.position.loader = loader = self.loader.state_dict() if inside else None
        assert loader is None or loader["done"] == self.learner.phase_steps, "a chunk was fetched ahead"
        if not inside:
            self.position.phase = None
        self.saved += 1
        wal = self.progress.sync()
        state = snapshot.take(self, inside, wal)
        checkpoint.save(self.folder.state, self.saved, state, self.plan.checkpoint["keep"])
        self.progress.commit(wal)
        self.last_save = time.monotonic()

    def _log_losses(self, values: dict[str, float], step: int) -> None:
        self.progress.losses(values, step)

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Record in `run.json` how the work on the run ended."""
        try:
            yield
        except Interrupted:
            self._ended("INTERRUPTED")
            raise
        except UserError as error:
            if getattr(self, "progress", None) is None or not self.folder.state.exists():
                raise  # it was refused before anything began
            self._ended("FAILED", error=one_line(error))
            raise RunFailed(str(error)) from error
        except BaseException as error:
            self._ended("FAILED", error=one_line(error))
            raise

    def _ended(self, status: str, **facts: Any) -> None:
        self.folder.update(status=status, **facts)
        progress = getattr(self, "progress", None)
        if progress is not None:
            progress.end("KILLED" if status == "INTERRUPTED" else "FAILED")
            progress.commit(progress.sync())
            progress.close()


def _accelerator(name: str) -> str:
    """'cpu' or 'gpu'.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "gpu" and not available:
        raise UserError("trainer.accelerator: expected a GPU that torch can use, found none")
    return "gpu" if name == "gpu" or (name == "auto" and available) else "cpu"
