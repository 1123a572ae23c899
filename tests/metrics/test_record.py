"""What is recorded comes back, row by row, and half-written or later rows do no harm."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cmoe.errors import RunFailed
from cmoe.metrics import Column, Record, compute, view

from .helpers import classification, column, language


def save(record, directory):
    record.save_targets(directory)
    for i in record.rows:
        record.save_row(directory, i)
    for row in record.within:
        record.save_row(directory, row.index, row.step)


def same(a, b):
    assert (a.kind, a.names, a.classes, list(a.rows)) == (b.kind, b.names, b.classes, list(b.rows))
    assert all(np.array_equal(x, y) for x, y in zip(a.targets, b.targets, strict=True))
    for i, row in a.rows.items():
        assert row.columns.keys() == b.rows[i].columns.keys()
        for j, c in row.columns.items():
            ours, theirs = c.arrays(), b.rows[i].columns[j].arrays()
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


@pytest.mark.parametrize("make", [classification, language])
def test_round_trip(make, tmp_path):
    record = make()
    save(record, tmp_path)
    same(record, Record.load(tmp_path))
    assert compute(record) == compute(Record.load(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} >= {
        "targets.safetensors",
        "row_init.safetensors",
        "row_0002.safetensors",
    }


def test_equal_records_give_equal_files(tmp_path):
    for name in "ab":
        save(classification(3), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_rows_after_the_checkpoint_are_ignored(tmp_path):
    record = classification()
    rng = np.random.default_rng(1)
    for index, step in ((1, 50), (2, 100), (2, 200), (3, 300)):
        record.add_row(index, {j: column(rng, record, j) for j in range(4)}, step)
    save(record, tmp_path)
    assert list(Record.load(tmp_path, rows=2).rows) == [-1, 0, 1]
    assert [r.step for r in Record.load(tmp_path, rows=2).within] == [50]
    assert [r.step for r in Record.load(tmp_path, rows=2, step=100).within] == [50, 100]
    assert list(Record.load(tmp_path, rows=0).rows) == [-1]
    (tmp_path / "row_0003.safetensors").write_bytes(b"torn")
    assert list(Record.load(tmp_path, rows=3).rows) == [-1, 0, 1, 2]
    with pytest.raises(RunFailed, match=r"row_0003"):
        Record.load(tmp_path)


def test_a_kill_before_the_rename_leaves_the_old_row(tmp_path, monkeypatch):
    record = classification()
    save(record, tmp_path)
    before = (tmp_path / "row_0001.safetensors").read_bytes()
    record.add_row(1, {0: Column(pred=np.zeros(13))})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.save_row(tmp_path, 1)
    assert (tmp_path / "row_0001.safetensors").read_bytes() == before
    assert list(Record.load(tmp_path).rows) == [-1, 0, 1, 2, 3]


def test_columns_that_were_not_evaluated_are_nan(tmp_path):
    record = classification(rows=[])
    rng = np.random.default_rng(0)
    record.add_row(0, {0: column(rng, record, 0)})
    record.add_row(2, {0: column(rng, record, 0), 2: column(rng, record, 2)})
    save(record, tmp_path)
    R = view(Record.load(tmp_path), "class_il").R
    assert R.shape == (3, 4)
    assert np.isfinite(R).tolist() == [[True, False, False, False], [False] * 4, [True, False, True, False]]


def test_wrong_shapes_are_refused():
    record = classification()
    with pytest.raises(AssertionError, match="12 of 13"):
        record.add_row(0, {0: Column(pred=np.zeros(12))})
    with pytest.raises(AssertionError, match="equally long"):
        Column(pred=np.zeros(3), confidence=np.zeros(4))
    with pytest.raises(AssertionError, match="nll"):
        record.add_row(0, {0: Column(nll=np.zeros(13))})
