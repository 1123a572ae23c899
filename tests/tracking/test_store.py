"""Where things are kept."""

from __future__ import annotations

import sqlite3

import pytest

from cmoe.tracking import store


def test_where(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = store.locate(tmp_path)
    assert own.local
    assert own.uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert store.locate(tmp_path).uri == "http://env:1"
    assert not store.locate(tmp_path).local
    assert store.locate(tmp_path, "http://given:2").uri == "http://given:2"
    assert store.locate(tmp_path, "https://me:pw@host:8/x").name == "https://host:8/x"


def test_the_database_is_in_wal_mode_and_made_once(template):
    with sqlite3.connect(template) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not list(template.parent.glob(".mlflow.db.new*"))
    before = template.stat().st_mtime_ns
    store.prepare(store.Location(template.parent, f"sqlite:///{template}", True))
    assert template.stat().st_mtime_ns == before


def test_experiments_are_made_restored_and_kept_apart(location):
    client = store.client(location)
    first = store.experiment(client, location, "split/digits ü")
    assert store.experiment(client, location, "split/digits ü").experiment_id == first.experiment_id
    assert first.artifact_location.startswith((location.root / "artifacts").as_uri())
    assert "split%2Fdigits" in first.artifact_location.replace("%25", "%")
    client.delete_experiment(first.experiment_id)
    again = store.experiment(client, location, "split/digits ü")
    assert client.get_experiment(again.experiment_id).lifecycle_stage == "active"


def test_a_killed_run_is_found_by_its_tag_and_reopened(location):
    client = store.client(location)
    exp = store.experiment(client, location, "e").experiment_id
    run = store.open_run(client, exp, "r-1")
    assert store.open_run(client, exp, "r-1") == run
    assert store.open_run(client, exp, "r-2") != run
    store.end_run(client, run, "KILLED", 5)
    assert client.get_run(run).info.status == "KILLED"
    assert store.open_run(client, exp, "r-1") == run
    assert client.get_run(run).info.status == "RUNNING"


def test_a_closed_port_is_noticed_at_once(tmp_path):
    with pytest.raises(ConnectionError, match="no tracking server answers"):
        store.client(store.locate(tmp_path, "http://127.0.0.1:9"))
