"""The thread that delivers while the run goes on. It may fail as often as it likes: the run never notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cmoe.tracking.deliver import Delivery

RETRY_AFTER = 30.0  # seconds that a failed delivery rests, so that a dead server costs nothing


class Courier:
    """Delivers in a daemon thread whenever it is notified, and once more when it is stopped.

    The thread starts with the first notification: a process that never commits has none, and a forked child starts its
    own.

    Args:
        delivery: what to deliver where.
        on_problem: told once, with one line, when delivery fails.
    """

    def __init__(self, delivery: Delivery, on_problem: Callable[[str], None]) -> None:
        self._delivery = delivery
        self._on_problem = on_problem
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._work = False
        self._stopping = False
        self._told = False
        self.failed: str | None = None

    def notify(self) -> None:
        """There is something new to deliver."""
        with self._wake:
            self._work = True
            self._wake.notify()
        if self._thread is None or not self._thread.is_alive():  # a forked child has no thread of its parent's
            self._thread = threading.Thread(target=self._loop, name="cmoe-delivery", daemon=True)
            self._thread.start()

    def stop(self, patience: float) -> bool:
        """Lets a last delivery run for up to `patience` seconds; returns whether everything got there."""
        if self._thread is None:
            return True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(patience)
        if self._thread.is_alive():
            self._problem(f"delivery took longer than {patience:.0f} s")
            return False
        return self.failed is None

    def _loop(self) -> None:
        rest_until = 0.0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._work or self._stopping)
                stopping, self._work = self._stopping, False
            if stopping or time.monotonic() >= rest_until:
                # a local database may be busy with the other runs of a sweep: at the end, ask again
                attempts = 3 if stopping and self._delivery.location.local else 1
                if not any(self._deliver(final=k == attempts - 1) for k in range(attempts)):
                    rest_until = time.monotonic() + RETRY_AFTER
            if stopping:
                return

    def _deliver(self, final: bool) -> bool:
        try:
            self._delivery.deliver()
        except Exception as error:  # any trouble of the tracking server is not the run's
            if final:
                self._problem(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            return False
        self.failed = None
        return True

    def _problem(self, reason: str) -> None:
        self.failed = reason
        if not self._told:
            self._told = True
            where = self._delivery.location.name
            run = self._delivery.run_id
            self._on_problem(
                f"tracking: {where} cannot be reached, the run goes on and keeps its log; "
                f"deliver it later with: cmoe sync {run} ({reason})"
            )
