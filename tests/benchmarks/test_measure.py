"""Clock, turns, memory and table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")
MIB = 2**20


def test_contestants_take_turns_from_both_ends(program):
    measure = program("measure")
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.alternate(runs, CPU, repeats=4, at_least=0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_short_passes_are_repeated_within_a_measurement(program, monkeypatch):
    measure = program("measure")
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls: list[str] = []

    def passing(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    runs = {"short": passing("short", 0.003), "long": passing("long", 0.02)}
    times = measure.alternate(runs, CPU, repeats=3, at_least=0.01)
    assert calls.count("short") == 1 + 3 * 4
    assert calls.count("long") == 1 + 3
    assert times == {"short": pytest.approx([0.003] * 3), "long": pytest.approx([0.02] * 3)}


def test_medians(program):
    assert program("measure").medians({"a": [3.0, 1.0, 100.0], "b": [1.0, 2.0]}) == {"a": 3.0, "b": 1.5}


def test_peak_memory_counts_what_is_held_at_once(program):
    measure = program("measure")
    kept: list[torch.Tensor] = []

    def run() -> None:
        first = torch.ones(MIB)  # 4 MiB
        second = torch.ones(2 * MIB)  # 12 MiB in all
        del first
        third = torch.ones(MIB // 2)  # 10 MiB
        del second
        kept.append(third)

    assert measure.peak_memory(run, kept.clear, CPU) / MIB == pytest.approx(12, abs=0.1)
    # what an earlier pass left is neither counted nor subtracted
    assert measure.peak_memory(run, kept.clear, CPU) / MIB == pytest.approx(12, abs=0.1)


def test_the_bandwidth_is_one_that_a_machine_has(program):
    assert 1e8 < program("measure").bandwidth(CPU, size=16 * MIB, repeats=3) < 1e13


def test_the_table_is_markdown(program):
    got = program("measure").table([["a", "1.0"], ["bbb", "10.0"]], ["name", "ms"])
    assert got.splitlines() == ["| name |   ms |", "|------|-----:|", "| a    |  1.0 |", "| bbb  | 10.0 |"]


def test_the_machine_is_named(program):
    name = program("measure").machine(CPU)
    assert torch.__version__ in name
    assert "thread" in name
