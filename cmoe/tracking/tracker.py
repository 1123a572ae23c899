"""What a run calls to log: everything goes to the write-ahead log, and from there to MLflow in the background."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cmoe.tracking import deliver
from cmoe.tracking.courier import Courier
from cmoe.tracking.files import write_atomic
from cmoe.tracking.store import Location
from cmoe.tracking.wal import WriteAheadLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _ignore(_: str) -> None:
    pass


class Tracker:
    """One run's log.

    Usage:
        tracker = Tracker(run_dir, run_id, "digits", locate("mlruns"))
        tracker.metrics({"train/loss": 0.3}, step=10)
        length = tracker.sync()      # durable; the checkpoint stores the length
        ...                          # the checkpoint is written and renamed
        tracker.commit(length)       # what came before may be delivered
        tracker.finish("FINISHED")
    After a kill: `tracker.resume(length)` with the length that the checkpoint holds, before logging anything.

    Args:
        run_dir: the run's folder; the log is `wal.jsonl` in it.
        run_id: name and tag of the run in MLflow.
        experiment: the MLflow experiment.
        location: where MLflow's data goes; None keeps everything in the run's folder.
        on_problem: told once, with one line, when the tracking server cannot be reached.
        now: milliseconds since the epoch.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        experiment: str,
        location: Location | None,
        on_problem: Callable[[str], None] = _ignore,
        now: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.wal = WriteAheadLog(self.run_dir / deliver.LOG, now)
        self._courier = (
            Courier(deliver.Delivery(self.run_dir, run_id, experiment, location), on_problem) if location else None
        )

    def metric(self, name: str, value: float | None, step: int) -> None:
        """Logs one number; None (an absent metric) is not logged."""
        self.metrics({name: value}, step)

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Logs numbers of the same step and moment under their names ('/' groups them in the UI's sections)."""
        present = {name: float(v) for name, v in values.items() if v is not None}
        if present:
            # JSON has no NaN; null is logged as NaN, infinities as the largest numbers
            finite = {k: None if math.isnan(v) else max(min(v, 1.7e308), -1.7e308) for k, v in present.items()}
            self.wal.append("metric", step=int(step), values=finite)

    def params(self, values: Mapping[str, object]) -> None:
        """Logs parameters, by which MLflow filters and groups runs."""
        for key, value in values.items():
            self.wal.append("param", key=key, value=str(value))

    def tag(self, key: str, value: object) -> None:
        """Logs a tag; a later value replaces an earlier one."""
        self.wal.append("tag", key=key, value=str(value))

    def dataset(self, name: str, digest: str, context: str = "train") -> None:
        """Names the data that the run used, with the fingerprint of its content."""
        self.wal.append("dataset", name=name, digest=digest[:36], context=context)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a file that lies in the run's folder, under `folder` among the run's artifacts."""
        relative = Path(path).absolute().relative_to(self.run_dir.absolute())
        self.wal.append("artifact", path=str(relative), folder=folder)

    def text(self, name: str, content: str, folder: str | None = None) -> Path:
        """Writes `content` to `name` in the run's folder and logs it as an artifact."""
        path = self.run_dir / name
        write_atomic(path, content.encode())
        self.artifact(path, folder)
        return path

    def figure(self, name: str, figure: Figure) -> Path:
        """Saves a figure as `figures/<name>.png` and logs it as an artifact."""
        from cmoe.tracking.figures import png

        path = self.run_dir / "figures" / f"{name}.png"
        write_atomic(path, png(figure))
        self.artifact(path, "figures")
        return path

    def sync(self) -> int:
        """Makes everything logged so far durable; returns the log's length for the checkpoint."""
        return self.wal.sync()

    def commit(self, length: int) -> None:
        """A durable checkpoint holds `length`: what was logged before it may be delivered."""
        deliver.commit(self.run_dir, length)
        if self._courier:
            self._courier.notify()

    def resume(self, length: int) -> None:
        """Goes back to the log as the checkpoint knew it.

        Raises:
            ValueError: the log is shorter than that.
        """
        self.wal.truncate(length, deliver.delivered(self.run_dir))
        deliver.rewind(self.run_dir, length)

    def end(self, status: str) -> None:
        """Logs that the run ended as FINISHED, FAILED or KILLED.

        What is logged and committed after the last checkpoint is delivered too: when the run is resumed, the same lines
        get the same time stamps (see `wal`).
        """
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        self.wal.append("status", value=status)

    def close(self, patience: float = 120.0) -> bool:
        """Lets the last delivery run for up to `patience` seconds; returns whether everything was delivered."""
        return self._courier.stop(patience) if self._courier else True

    def finish(self, status: str, patience: float = 120.0) -> bool:
        """`end`, `commit` and `close` in one."""
        self.end(status)
        self.commit(self.sync())
        return self.close(patience)
