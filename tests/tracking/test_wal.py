"""The log survives kills, and goes back to a checkpoint."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmoe.tracking.wal import WriteAheadLog, read, whole_lines


def log(path, start=0):
    clock = itertools.count(start)
    return WriteAheadLog(path, lambda: next(clock))


def entries(path, start=0):
    return [entry for entry, _ in read(path, start, path.stat().st_size)]


def test_nothing_is_written_before_sync_and_the_length_is_the_files(tmp_path):
    path = tmp_path / "wal.jsonl"
    wal = log(path)
    wal.append("metric", step=1, values={"a": 0.1})
    assert not path.exists()
    length = wal.sync()
    assert length == path.stat().st_size == wal.sync()
    assert entries(path) == [{"t": 0, "kind": "metric", "step": 1, "values": {"a": 0.1}}]
    wal.append("tag", key="k", value='ä\n"')
    assert wal.sync() > length
    assert [e["value"] for e in entries(path, length)] == ['ä\n"']


def test_floats_come_back_exactly(tmp_path):
    wal = log(tmp_path / "w")
    values = {str(k): x for k, x in enumerate([0.1, 1 / 3, 5e-324, 1.7e308, -0.0])}
    wal.append("metric", step=0, values=values)
    wal.sync()
    assert entries(tmp_path / "w")[0]["values"] == values


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400))
def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("w") / "wal.jsonl"
    wal = log(path)
    for step in range(5):
        wal.append("metric", step=step, values={"loss": step / 3})
    full = wal.sync()
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, full)])
    expected = whole[: min(cut, full)].count(b"\n")
    assert len(entries(path)) == expected
    again = log(path)
    assert path.stat().st_size == whole_lines(path)
    again.append("tag", key="a", value="b")
    again.sync()
    assert [e["kind"] for e in entries(path)] == ["metric"] * expected + ["tag"]


def test_truncate_goes_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "w"
    wal = log(path)
    wal.append("metric", step=0, values={"a": 1.0})
    length = wal.sync()
    wal.append("metric", step=1, values={"a": 2.0})
    wal.sync()
    wal.append("metric", step=2, values={"a": 3.0})  # only in memory
    wal.truncate(length)
    assert wal.sync() == length
    assert [e["step"] for e in entries(path)] == [0]
    with pytest.raises(ValueError, match="expected at least"):
        wal.truncate(length + 1)


def test_replayed_lines_take_the_time_stamps_of_delivered_ones(tmp_path):
    path = tmp_path / "w"
    wal = log(path)
    lengths = []
    for step in range(3):
        wal.append("metric", step=step, values={"loss": step / 7, "time/step": 1.0 + step})
        lengths.append(wal.sync())
    before = entries(path)
    wal.truncate(0, delivered=lengths[1])
    wal = log(path, start=1000)  # killed and resumed once more: the ghosts are on disk
    for step in range(3):
        wal.append("metric", step=step, values={"loss": step / 7, "time/step": 50.0})
    wal.sync()
    after = entries(path)
    assert after[:2] == before[:2]  # wall-clock values too: they cannot be the same twice
    assert after[2]["t"] >= 1000
    assert after[2]["values"]["time/step"] == 50.0


def test_a_torn_ghost_is_forgotten(tmp_path):
    """A kill while ghosts are written leaves half a line; later ghosts go after whole lines."""
    path = tmp_path / "w"
    wal = log(path)
    for step in range(3):
        wal.append("metric", step=step, values={"loss": 0.0})
    end = wal.sync()
    before = entries(path)
    wal.truncate(0, delivered=end)
    ghosts = path.with_name("wal.ghosts.jsonl")
    ghosts.write_bytes(ghosts.read_bytes()[:-5])
    wal = log(path, start=1000)
    for step in range(4):
        wal.append("metric", step=step, values={"loss": 0.0})
    wal.sync()
    wal.truncate(0, delivered=path.stat().st_size)
    wal = log(path, start=2000)
    for step in range(4):
        wal.append("metric", step=step, values={"loss": 0.0})
    wal.sync()
    after = entries(path)
    assert after[:2] == before[:2]
    assert [1000 <= e["t"] < 2000 for e in after[2:]] == [True, True]
