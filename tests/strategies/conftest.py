"""One thread, global generators as they were, and no pictures."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.drawing import undrawn


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - Avalanche uses the global one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is four fifths of a small run's time; the tests of tracking look at the pictures."""
    undrawn(monkeypatch.setattr)
