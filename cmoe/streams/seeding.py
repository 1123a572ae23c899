"""Random numbers of our own, and other people's kept out of ours."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*keys: int | str) -> int:
    """A seed that depends on every key and its place; 32 bits, which is all that torch's CPU generator uses."""
    text = "\x1f".join(map(repr, keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive(*keys)`."""
    return torch.Generator().manual_seed(derive(*keys))


@contextmanager
def global_rng_kept(seed: int) -> Generator[None]:
    """Torch's, numpy's and Python's global generators seeded inside, and put back as they were afterwards.

    A plugin may draw from them and gets the same numbers for the same seed; Avalanche reseeds them.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what is kept
    # naming no device keeps CUDA asleep when nobody woke it
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            own = derive(seed, "stream")
            random.seed(own)
            np.random.seed(own)  # noqa: NPY002
            torch.manual_seed(own)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
