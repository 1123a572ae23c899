"""The exact state of a session as plain containers and tensors, taken and restored."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmoe import carried, checkpoint
from cmoe.environment import differences
from cmoe.errors import UserError
from cmoe.metrics import Record

if TYPE_CHECKING:
    from cmoe.session import Session


@dataclass
class Position:
    """Where a run is.

    Attributes:
        segment: number of the segment that is trained, or comes next.
        phase: number of its phase in progress; None between segments.
        loader: the batch scheduler's state inside a phase.
    """

    segment: int = 0
    phase: int | None = None
    loader: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"segment": self.segment, "phase": self.phase, "loader": self.loader}


def take(session: Session, inside: bool, wal: int) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        session: as it is now.
        inside: in the middle of a phase, so that optimizer and loader belong to the state.
        wal: length of the write-ahead log.
    """
    return {
        "position": session.position.to_dict(),
        "seen": session.context.seen,
        "previous": session.context.previous,
        "structure": session.model.structure(),
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict() if inside and session.optimizer is not None else None,
        "carried": session.carried,
        "strategies": [s.state_dict() for s in session.strategies],
        "generators": checkpoint.generators(),
        "rows": session.position.segment and session.segments[session.position.segment - 1].last + 1,
        "timeline": session.timeline.to_list(),
        "loads": session.loads,
        "routes": session.routes,
        "steps": session.learner.steps,
        "phase_steps": session.learner.phase_steps,
        "seconds": session.earlier_seconds + time.monotonic() - session.started,
        "wal": wal,
        "data": session.stream.fingerprint,
        "environment": session.environment,
    }


def restore(session: Session, state: dict[str, Any]) -> None:
    """Bring a newly opened session to a checkpoint's state.

    Raises:
        UserError: the data, the machine or the versions changed since, and the session does not go on anyway.
    """
    if state["data"] not in (session.stream.fingerprint, *session.stream.prefixes) and not session.anyway:
        raise UserError(f"run {session.folder.id}: the data changed since the run began; --anyway goes on all the same")
    changed = differences(state["environment"], session.environment)
    if changed and not session.anyway:
        raise UserError(
            f"run {session.folder.id}: not bit-identical here ({'; '.join(changed)}); --anyway goes on all the same"
        )
    session.position = Position(**state["position"])
    session.context.seen, session.context.previous = list(state["seen"]), list(state["previous"])
    session.model.restore_structure(state["structure"])
    session.model.load_state_dict(state["model"])
    session.model.to(session.placement.device)
    for strategy, saved in zip(session.strategies, state["strategies"], strict=True):
        strategy.load_state_dict(saved)
    # an extended run has more experiences than its earlier rows know
    session.record = session.evaluator.new_record()
    for row in Record.load(session.folder.rows, rows=state["rows"]).rows.values():
        session.record.add_row(row.index, row.columns)
    session.record.save_targets(session.folder.rows)
    session.timeline.events = state["timeline"]
    session.loads = state["loads"]
    session.routes = state.get("routes", {})
    session.carried = state["carried"]
    session.names = carried.names(session.model)
    session.learner.steps = state["steps"]
    session.saved = state["number"]
    session.earlier_seconds = state["seconds"]
    session.phase_in_progress = (state["optimizer"], state["phase_steps"])
