"""What all tests share: one thread, real data where it is at hand, and no run output in the working folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# before anything computes: two OpenMP threads per worker would fight over the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell without job control starts what it runs in the background deaf to Ctrl-C, and what that starts too: tests that
# interrupt a process would wait in vain
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the machine's user must not reach a test."""
    for name in ("MLFLOW_TRACKING_URI", "CMOE_MAX_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with the real data sets; skips where there is none."""
    for root in filter(None, (os.environ.get("CMOE_DATA"), ROOT.parent / "shared" / "data")):
        if (Path(root) / "MNIST").exists():
            return Path(root)
    pytest.skip("no real data sets: set CMOE_DATA to a folder that holds MNIST and the others")
