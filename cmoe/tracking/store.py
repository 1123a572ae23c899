"""Where MLflow keeps things, and how a run is found there again.

Without a tracking server everything lies under one folder: `mlflow.db` (SQLite) and `artifacts/<experiment>`. Making
the database takes seconds of migrations and must not happen twice at once, so it is made under a file lock, at another
name, and renamed when complete: a kill leaves no half database.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

RUN_TAG = "cmoe.run"

# An unreachable server blocks one call for four minutes by MLflow's defaults.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to --json
}


@dataclass(frozen=True)
class Location:
    """A place for MLflow's data.

    Attributes:
        root: folder of all run output.
        uri: tracking URI.
        local: whether it is the SQLite file under `root`, which we make ourselves.
    """

    root: Path
    uri: str
    local: bool

    @property
    def name(self) -> str:
        """The URI without user name and password, to be shown and stored."""
        parts = urlsplit(self.uri)
        if "@" not in parts.netloc:
            return self.uri
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def locate(root: str | Path = "mlruns", uri: str | None = None, recorded: str | None = None) -> Location:
    """`uri`, else `$MLFLOW_TRACKING_URI`, else where the run was `recorded` to go, else SQLite under `root`."""
    root = Path(root).absolute()
    given = uri or os.environ.get("MLFLOW_TRACKING_URI") or recorded
    own = f"sqlite:///{root / 'mlflow.db'}"
    return Location(root, given or own, given is None or given == own)


def prepare(location: Location) -> None:
    """Makes the database of a local location, once; other locations are the server's business.

    Raises:
        filelock.Timeout: another process has been making it for two minutes.
    """
    database = location.root / "mlflow.db"
    if not location.local or database.exists():
        return
    from filelock import FileLock

    location.root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(location.root / ".mlflow.lock"), timeout=120):
        if database.exists():
            return
        unfinished = location.root / ".mlflow.db.new"
        for leftover in location.root.glob(".mlflow.db.new*"):
            leftover.unlink()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # before _quiet: it sets log levels

        with _quiet():
            store = SqlAlchemyStore(f"sqlite:///{unfinished}", (location.root / "artifacts").as_uri())
            store.engine.dispose()
        with contextlib.closing(sqlite3.connect(unfinished)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # stays with the file; writers do not block readers
        os.replace(unfinished, database)


def client(location: Location) -> MlflowClient:
    """A client of the location; makes a local database first.

    Raises:
        ConnectionError: nothing listens at a server's address (found out within three seconds).
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    _knock(location.uri)
    prepare(location)
    from mlflow.tracking import MlflowClient

    with _quiet():
        return MlflowClient(tracking_uri=location.uri)


def experiment(client: MlflowClient, location: Location, name: str) -> Experiment:
    """The experiment of that name, made (or restored) when it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        folder = (location.root / "artifacts" / quote(name, safe=" ")).as_uri() if location.local else None
        with contextlib.suppress(MlflowException):  # another process was quicker
            client.create_experiment(name, artifact_location=folder)
        found = client.get_experiment_by_name(name)
        if found is None:
            raise ConnectionError(f"{location.name}: the experiment '{name}' could not be made")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def find_run(client: MlflowClient, experiment_id: str, run_id: str) -> str | None:
    """MLflow's id of the run with tag `cmoe.run`, or None."""
    quoted = run_id.replace("'", "")  # our ids have no quotes; the filter language has no escape
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{quoted}'", max_results=1)
    return found[0].info.run_id if found else None


def open_run(client: MlflowClient, experiment_id: str, run_id: str, start_ms: int | None = None) -> str:
    """The run with tag `cmoe.run`, made when it is not there, and RUNNING (a killed or ended one is reopened)."""
    found = find_run(client, experiment_id, run_id)
    if found is None:
        return client.create_run(experiment_id, start_ms, {RUN_TAG: run_id}, run_id).info.run_id
    if client.get_run(found).info.status != "RUNNING":
        client.update_run(found, "RUNNING")
    return found


def sweep_uploads(client: MlflowClient, mlflow_run: str) -> None:
    """Delete the temporary files that a killed upload left in a local artifact folder; MLflow never does."""
    uri = urlsplit(client.get_run(mlflow_run).info.artifact_uri or "")
    if uri.scheme in ("", "file"):
        for path in Path(unquote(uri.path)).rglob(".artifact.uploading.*"):
            path.unlink(missing_ok=True)


def end_run(client: MlflowClient, mlflow_run: str, status: str, end_ms: int) -> None:
    """Ends a run: FINISHED, FAILED or KILLED."""
    assert status in ("FINISHED", "FAILED", "KILLED"), status
    client.set_terminated(mlflow_run, status, end_ms)


def _knock(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname and not _through_proxy(parts.scheme, parts.hostname):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname, port), timeout=3).close()
        except OSError as error:
            raise ConnectionError(f"no tracking server answers at {parts.hostname}:{port} ({error})") from error


def _through_proxy(scheme: str, host: str) -> bool:
    return scheme in getproxies() and not proxy_bypass(host)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """MLflow and alembic report every migration; that is no news for a user."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
