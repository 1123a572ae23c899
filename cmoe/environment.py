"""What a bit-identical repetition depends on, recorded with every run."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

# a difference in one of these changes bits; the others are for the record
EXACT = ("torch", "numpy", "threads", "device", "cpu", "code", "plugins")


def environment(threads: int, device: str, plugins: str = "") -> dict[str, Any]:
    """Everything about this machine and installation that results may depend on.

    Args:
        threads: CPU threads of the run.
        device: where the model is.
        plugins: fingerprint of the source of components that do not come with cmoe.
    """
    import numpy
    import torch

    from cmoe.tracking.layout import git_commit, versions

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "device": device,
        "code": code_fingerprint(),
        "plugins": plugins,
        "git": git_commit(),
    }


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What would keep a resumed run from being bit-identical, one phrase each."""
    pairs = [(k, recorded.get(k) or None, present.get(k) or None) for k in EXACT]
    return [f"{k} was {was}, is {now}" for k, was, now in pairs if was != now]


@cache  # a process computes with what it imported, whatever happens to the files
def code_fingerprint() -> str:
    """Hash of cmoe's own source, 12 hexadecimal digits."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # commands, reports and the tracking store do not take part in the computation
        if relative.parts[0] in ("cli", "tracking", "_builtin"):
            continue
        digest.update(str(relative).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
