"""Memory that stays with the process: seen in a process of its own, since nothing takes the setting back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import torch
from cmoe.moe import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(64 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
done = keep_memory(), keep_memory()
faults()
print(json.dumps([without, *done, faults()]))
"""


def test_large_blocks_are_not_asked_for_again() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the C library is another one")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    without, first, again, kept = json.loads(done.stdout)
    if not first:
        pytest.skip("the C library is not glibc")
    assert again
    assert without > 50  # 4 KiB each, or 2 MiB where the kernel gives huge pages
    assert kept < without / 10
