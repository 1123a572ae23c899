"""Time, memory and the machine's name: what the benchmark programs of the MoE layer share, on CPU and GPU alike."""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Pass = Callable[[], Any]
MIB = 2**20


def add_malloc(parser: argparse.ArgumentParser) -> None:
    """The option that says how the process holds memory."""
    parser.add_argument(
        "--malloc",
        choices=("kept", "default"),
        default="default",
        help="kept: large blocks stay for the next pass, as in runs of cmoe (cmoe.moe.keep_memory)",
    )


def machine(device: torch.device, malloc: str = "") -> str:
    """What the figures were measured on: the processor, its kernels, torch, threads, and how memory is held."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = named[0] if named else name
    kernels = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    held = f", memory {malloc}" if malloc else ""
    return f"{name} ({kernels}), {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}{held}"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; on a CPU it always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Pass, device: torch.device, passes: int = 1) -> float:
    """Wall clock of one pass, the mean of `passes` in a row: what a user waits, the host's work included."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(passes):
        run()
    synchronise(device)
    return (time.perf_counter() - begin) / passes


def alternate(
    runs: Mapping[str, Pass], device: torch.device, repeats: int, at_least: float = 0.01
) -> dict[str, list[float]]:
    """Seconds of each contestant, measured in turns: forwards in even rounds, backwards in odd ones.

    Args:
        runs: name -> a warmed-up pass.
        repeats: rounds.
        at_least: seconds that one measurement should take; short passes are repeated within it.
    """
    passes = {name: max(1, math.ceil(at_least / max(seconds(run, device), 1e-9))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats):
        for name in names if i % 2 == 0 else reversed(names):
            times[name].append(seconds(runs[name], device, passes[name]))
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each contestant's measurements."""
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(run: Pass, clear: Pass, device: torch.device) -> int:
    """The most bytes of tensors that one pass holds beyond what was there before it.

    On a CPU from the allocator's record in a profile of the pass; scratch memory of the matrix libraries is not in it.

    Args:
        run: the pass.
        clear: lets go of what an earlier pass left, so that all that this one makes is counted.
        device: where it runs.
    """
    clear()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    profiler = record.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def bandwidth(device: torch.device, size: int = 256 * MIB, repeats: int = 9) -> float:
    """Bytes per second, read and written, of a large copy at its fastest: the machine's practical memory bandwidth."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * size / min(seconds(copy, device) for _ in range(repeats))


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A Markdown table with columns of equal width: the first one to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])
