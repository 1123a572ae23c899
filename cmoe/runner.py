"""The one road: a plan becomes a trained, evaluated, tracked run that can be resumed exactly."""

from __future__ import annotations

from typing import Any

from cmoe.session import Session


def train(session: Session) -> dict[str, Any]:
    """Train every segment that is left, evaluate its row, log it and save the exact state.

    Args:
        session: a run, new or restored.

    Returns:
        The run's facts, as `run.json` holds them.
    """
    session.open()
    for segment in session.remaining():
        if not session.inside_segment:
            session.begin(segment)
            for strategy in session.strategies:
                strategy.before_experience(segment)
            session.announce(segment)
        if session.native is not None:
            session.train_natively(segment)
        else:
            for number, phase in session.remaining_phases(segment):
                session.fit(segment, number, phase)
                for strategy in session.strategies:
                    strategy.after_phase(segment, phase)
        for strategy in session.strategies:
            strategy.after_experience(segment)
        session.evaluate(segment)
        session.end(segment)
    return session.close()
