"""From the write-ahead log to MLflow: only committed lines, in batches, each once.

After every batch the offset reached is written to `delivered.json`. A kill between the two delivers the batch a second
time with the same time stamps and values, which MLflow recognises. One file lock per run keeps two processes apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmoe.tracking import store
from cmoe.tracking.files import read_json, write_json
from cmoe.tracking.wal import Entry, read

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOG = "wal.jsonl"
COMMITTED = "committed.json"
DELIVERED = "delivered.json"

MAX_METRICS = 900  # MLflow takes 1000 metrics, parameters and tags together,
MAX_OTHERS = 50  # and 100 of each of the other two
MAX_VALUE = 5000  # characters of a parameter or tag


def committed(run_dir: Path) -> int:
    """Bytes of the log that the last durable checkpoint covers."""
    return int(read_json(Path(run_dir) / COMMITTED, {}).get("length", 0))


def commit(run_dir: Path, length: int) -> None:
    """Says that a durable checkpoint covers the log's first `length` bytes."""
    write_json(Path(run_dir) / COMMITTED, {"length": length})


def delivered(run_dir: Path) -> int:
    """Bytes of the log that some server has: the most of all servers that the run was delivered to."""
    return max((int(s["offset"]) for s in _servers(run_dir).values()), default=0)


def rewind(run_dir: Path, length: int) -> None:
    """Takes commits and cursors back to a shorter log, after `WriteAheadLog.truncate`."""
    if committed(run_dir) > length:
        commit(run_dir, length)
    servers = _servers(run_dir)
    if any(s["offset"] > length for s in servers.values()):
        back = {uri: {**s, "offset": min(s["offset"], length)} for uri, s in servers.items()}
        write_json(Path(run_dir) / DELIVERED, {"servers": back})


def pending(run_dir: Path, location: store.Location) -> int:
    """Committed bytes that this server does not have yet."""
    server = _servers(run_dir).get(location.name, {"offset": 0})
    return max(0, committed(run_dir) - int(server["offset"]))


def _servers(run_dir: Path) -> dict[str, dict[str, Any]]:
    return dict(read_json(Path(run_dir) / DELIVERED, {}).get("servers", {}))


@dataclass
class _Batch:
    """Entries that go out in one call."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def full(self) -> bool:
        return len(self.metrics) >= MAX_METRICS or max(len(self.params), len(self.tags)) >= MAX_OTHERS


class Delivery:
    """Delivers one run's log to one location.

    Args:
        run_dir: the run's folder, with `wal.jsonl`.
        run_id: the run's id, its name and its tag in MLflow.
        experiment: the MLflow experiment's name.
        location: see `store.locate`.
    """

    def __init__(self, run_dir: Path, run_id: str, experiment: str, location: store.Location) -> None:
        self.run_dir = Path(run_dir)
        self.run_id = run_id
        self.experiment = experiment
        self.location = location
        self._client: MlflowClient | None = None
        self._mlflow_run = ""

    def deliver(self) -> int:
        """Delivers all committed entries that this location does not have yet; returns how many bytes that was.

        Raises:
            Exception: whatever MLflow, its HTTP client or its database raise; what was delivered is remembered.
        """
        from filelock import FileLock

        if pending(self.run_dir, self.location) == 0:
            return 0
        with FileLock(str(self.run_dir / ".delivery.lock"), timeout=60):
            client = self._open()
            start = position = int(_servers(self.run_dir)[self.location.name]["offset"])
            batch = _Batch()
            for entry, after in read(self.run_dir / LOG, start, committed(self.run_dir)):
                if entry["kind"] in ("metric", "param", "tag"):
                    self._collect(client, batch, entry)
                else:
                    self._send(client, batch)
                    self._single(client, entry)
                position = after
                if batch.full() or entry["kind"] not in ("metric", "param", "tag"):
                    self._send(client, batch)
                    self._remember(position)
            self._send(client, batch)
            self._remember(position)
            return position - start

    def _open(self) -> MlflowClient:
        """The client, with the run found or made and the cursor valid for it."""
        if self._client is None:
            client = store.client(self.location)
            found = store.experiment(client, self.location, self.experiment)
            self._mlflow_run = store.open_run(client, found.experiment_id, self.run_id, self._started())
            if self.location.local:
                store.sweep_uploads(client, self._mlflow_run)
            self._client = client
        server = _servers(self.run_dir).get(self.location.name)
        if server is None or server["run"] != self._mlflow_run:  # new here, or its MLflow run was deleted
            self._remember(0)
        return self._client

    def _started(self) -> int | None:
        first = next(read(self.run_dir / LOG, 0, committed(self.run_dir)), None)
        return None if first is None else int(first[0]["t"])

    def _remember(self, offset: int) -> None:
        servers = _servers(self.run_dir)
        servers[self.location.name] = {"offset": offset, "run": self._mlflow_run}
        write_json(self.run_dir / DELIVERED, {"servers": servers})

    def _collect(self, client: MlflowClient, batch: _Batch, entry: Entry) -> None:
        from mlflow.entities import Metric

        if entry["kind"] == "metric":
            for key, value in entry["values"].items():
                if len(batch.metrics) >= MAX_METRICS:
                    self._send(client, batch)
                number = math.nan if value is None else float(value)
                batch.metrics.append(Metric(key, number, entry["t"], entry["step"]))
        else:
            group = batch.params if entry["kind"] == "param" else batch.tags
            group[str(entry["key"])] = str(entry["value"])[:MAX_VALUE]

    def _send(self, client: MlflowClient, batch: _Batch) -> None:
        if not (batch.metrics or batch.params or batch.tags):
            return
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        tags = [RunTag(k, v) for k, v in batch.tags.items()]
        params = [Param(k, v) for k, v in batch.params.items()]
        try:
            client.log_batch(self._mlflow_run, batch.metrics, params, tags)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or not params:
                raise
            # MLflow's parameters never change; a run that was extended has some new values: those become tags
            had = client.get_run(self._mlflow_run).data.params
            changed = [RunTag(f"changed.{p.key}", p.value) for p in params if had.get(p.key, p.value) != p.value]
            if not changed:
                raise
            fresh = [p for p in params if p.key not in had]
            client.log_batch(self._mlflow_run, batch.metrics, fresh, [*tags, *changed])
        batch.metrics, batch.params, batch.tags = [], {}, {}

    def _single(self, client: MlflowClient, entry: Entry) -> None:
        kind = entry["kind"]
        if kind == "artifact":
            path = self.run_dir / entry["path"]
            if path.exists():  # a file that was made again under another name since
                client.log_artifact(self._mlflow_run, str(path), entry["folder"])
        elif kind == "dataset":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(entry["name"], entry["digest"], "local", "{}")
            context = [InputTag("mlflow.data.context", entry["context"])]
            client.log_inputs(self._mlflow_run, [DatasetInput(data, context)])
        elif kind == "status":
            store.end_run(client, self._mlflow_run, entry["value"], entry["t"])
        else:
            raise AssertionError(f"unknown entry kind {kind!r}")


def sync(run_dir: Path, run_id: str, experiment: str, location: store.Location) -> int:
    """Delivers what a run could not deliver while it ran; returns the bytes delivered (0: nothing was missing).

    Raises:
        Exception: as `Delivery.deliver`.
    """
    return Delivery(run_dir, run_id, experiment, location).deliver()
