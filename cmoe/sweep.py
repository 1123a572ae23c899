"""Many runs, each in a process of its own, several at a time; what is finished already is skipped."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cmoe.config.plan import Plan
from cmoe.reporting import Reporter
from cmoe.rundir import RunFolder, runs
from cmoe.streams.data import DataFolder

# imported once in the fork server, whose children start at once
PRELOAD = ("cmoe.session", "cmoe.runner", "avalanche.training", "sklearn.datasets", "mlflow.tracking")


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        plan: what to run.
        name: for messages.
        run_id: once it is known.
        status: 'waiting', 'running', 'skipped' (finished before), 'finished', 'failed' or 'interrupted'.
        error: one line, when it failed.
        facts: what `run.json` says at the end.
    """

    plan: Plan
    name: str
    run_id: str | None = None
    status: str = "waiting"
    error: str | None = None
    facts: dict[str, Any] | None = None


Event = Callable[[Job, str, tuple[Any, ...]], None]


def earlier(plan: Plan) -> RunFolder | None:
    """The newest run of exactly this plan, finished or not."""
    found = None
    for folder in runs(Path(plan.tracking["root"])):
        facts = folder.facts()
        if facts.get("config_hash") == plan.hash and facts.get("experiment") == plan.experiment:
            found = folder
            if facts.get("status") == "FINISHED":
                return folder
    return found


def sweep(
    jobs: Sequence[Job],
    data: DataFolder,
    parallel: int,
    event: Event,
    stop: Callable[[], bool] = lambda: False,
    again: bool = False,
) -> None:
    """Run every job; each job's `status` says how it ended.

    Args:
        jobs: what to run, in order.
        data: where data sets are.
        parallel: processes at a time; CPU threads are divided among them.
        event: told what happens: (job, name of the reporter's method, its arguments).
        stop: asked between events whether the user wants to stop.
        again: run also what is finished already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    threads = max(1, (os.cpu_count() or 1) // parallel)
    waiting = list(jobs)
    running: dict[Connection, tuple[Job, Any]] = {}
    while waiting or running:
        while waiting and len(running) < parallel and not stop():
            job = waiting.pop(0)
            before = None if again else earlier(job.plan)
            if before is not None and before.facts().get("status") == "FINISHED":
                job.status, job.run_id, job.facts = "skipped", before.id, before.facts()
                event(job, "skipped", ())
                continue
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, job.plan.to_dict(), str(before.path) if before else None, str(data.root), threads)
            process = context.Process(target=_work, args=arguments, daemon=False)
            process.start()
            sender.close()
            job.status = "running"
            running[receiver] = (job, process)
        if stop():
            waiting.clear()
            for _, process in running.values():
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGINT)
        for connection in wait(list(running), timeout=0.5):
            assert isinstance(connection, Connection)
            job, process = running[connection]
            try:
                name, arguments = connection.recv()
            except EOFError:
                process.join()
                del running[connection]
                if job.status == "running":  # it ended without a word
                    job.status, job.error = "failed", f"its process ended with exit code {process.exitcode}"
                event(job, "ended", ())
                continue
            if name == "end":
                job.status, job.error, job.facts = arguments
            else:
                if name == "started":
                    job.run_id = arguments[0]
                event(job, name, arguments)


class _Remote(Reporter):
    """Sends every call through a pipe."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def started(self, run_id: str, facts: dict[str, Any]) -> None:
        self.connection.send(("started", (run_id, facts)))

    def segment(self, number: int, total: int, name: str, resumed: bool) -> None:
        self.connection.send(("segment", (number, total, name, resumed)))

    def row(self, row: int, values: dict[str, float]) -> None:
        self.connection.send(("row", (row, values)))

    def progress(self, phase: str, step: int, steps: int, loss: float | None) -> None:
        self.connection.send(("progress", (phase, step, steps, loss)))

    def note(self, text: str) -> None:
        self.connection.send(("note", (text,)))


def _work(sender: Connection, plan: dict[str, Any], folder: str | None, data: str, threads: int) -> None:
    """In the child: start or resume one run."""
    wants_stop = False

    def on_interrupt(*_: object) -> None:
        nonlocal wants_stop
        wants_stop = True

    signal.signal(signal.SIGINT, on_interrupt)
    os.environ["CMOE_MAX_THREADS"] = str(threads)
    from cmoe import api
    from cmoe.errors import UserError, one_line
    from cmoe.plugins import Catalogue
    from cmoe.session import Interrupted

    reporter = _Remote(sender)
    where = DataFolder(Path(data), "--data")
    try:
        if folder is not None:
            facts = api.resume(RunFolder(Path(folder)), where, reporter, lambda: wants_stop)
        else:
            catalogue = Catalogue(plan.get("plugins", []))
            facts = api.start(Plan.from_dict(plan, catalogue, "sweep"), catalogue, where, reporter, lambda: wants_stop)
        sender.send(("end", ("finished", None, facts)))
    except Interrupted:
        sender.send(("end", ("interrupted", None, None)))
    except UserError as error:
        sender.send(("end", ("failed", str(error), None)))
    except Exception as error:
        sender.send(("end", ("failed", one_line(error), None)))
    finally:
        sender.close()
