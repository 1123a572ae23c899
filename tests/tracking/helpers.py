"""Trackers with a clock that never gives the same time twice, and what MLflow got from them."""

from __future__ import annotations

import itertools

from cmoe.tracking import store
from cmoe.tracking.tracker import Tracker

CLOCK = itertools.count(1_700_000_000_000)


def tracker(location, run="run-a", experiment="digits", root=None, problems=None):
    run_dir = (root or location.root) / "runs" / run
    told = problems.append if problems is not None else _fail
    return Tracker(run_dir, run, experiment, location, told, now=lambda: next(CLOCK))


def _fail(message):
    raise AssertionError(message)


def histories(location, run="run-a", experiment="digits"):
    """(step, value) of every metric of a run, in the order of the steps, and the run."""
    client = store.client(location)
    found = store.find_run(client, store.experiment(client, location, experiment).experiment_id, run)
    if found is None:
        return {}, None
    state = client.get_run(found)
    points = {k: sorted((m.step, m.value) for m in client.get_metric_history(found, k)) for k in state.data.metrics}
    return points, state
