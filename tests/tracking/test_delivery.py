"""Whatever is killed or unreachable: MLflow has every committed metric once."""

from __future__ import annotations

import os
import random
import socket
import time

import pytest

from cmoe.tracking import deliver, store
from cmoe.tracking.deliver import Delivery, sync

from .helpers import histories, tracker


class Killed(BaseException):
    """Stands for kill -9 at this point."""


def log(t, steps):
    for step in steps:
        t.metrics({"train/loss": step / 7, "class_il/acc_macro": 1 - step / 9}, step)


def expected(n):
    return {
        "train/loss": [(s, s / 7) for s in range(n)],
        "class_il/acc_macro": [(s, 1 - s / 9) for s in range(n)],
    }


def test_a_run_arrives_whole(location):
    t = tracker(location)
    t.params({"strategy": "replay", "lr": 0.1})
    t.tag("cmoe.label", "ER")
    t.dataset("digits", "f" * 64)
    t.text("figures/a.csv", "x,y\n", "matrix")
    log(t, range(5))
    t.metrics({"absent": None, "nan": float("nan"), "inf": float("inf")}, 0)
    t.commit(t.sync())
    assert t.finish("FINISHED")
    points, run = histories(location)
    assert {k: points[k] for k in expected(5)} == expected(5)
    assert "absent" not in points
    assert points["nan"][0][1] != points["nan"][0][1]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run-a"
    assert run.data.params == {"strategy": "replay", "lr": "0.1"}
    assert run.data.tags["cmoe.label"] == "ER"
    assert run.data.tags[store.RUN_TAG] == "run-a"
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["digits"]
    client = store.client(location)
    assert [a.path for a in client.list_artifacts(run.info.run_id, "matrix")] == ["matrix/a.csv"]
    assert (location.root / "artifacts" / "digits").is_dir()


def test_only_what_a_checkpoint_covers_is_delivered(location):
    t = tracker(location)
    log(t, range(3))
    length = t.sync()
    log(t, range(3, 6))
    t.sync()
    deliver.commit(t.run_dir, length)
    delivery = Delivery(t.run_dir, "run-a", "digits", location)
    assert delivery.deliver() == length
    assert histories(location)[0] == expected(3)
    assert delivery.deliver() == 0


def test_large_logs_go_in_batches(location, monkeypatch):
    monkeypatch.setattr(deliver, "MAX_METRICS", 7)
    monkeypatch.setattr(deliver, "MAX_OTHERS", 3)
    t = tracker(location)
    t.params({f"p{k}": k for k in range(10)})
    t.metrics({f"m{k}": k for k in range(20)}, 0)
    log(t, range(20))
    t.finish("FINISHED")
    points, run = histories(location)
    assert {k: points[k] for k in expected(20)} == expected(20)
    assert len(points) == 22
    assert len(run.data.params) == 10


@pytest.mark.parametrize("seed", range(8))
def test_kills_between_batch_and_cursor_make_no_duplicates(location, monkeypatch, seed):
    monkeypatch.setattr(deliver, "MAX_METRICS", 6)
    rng = random.Random(seed)
    t = tracker(location)
    t.params({"a": 1})
    log(t, range(12))
    t.text("figures/a.csv", "x\n", "matrix")
    log(t, range(12, 20))
    deliver.commit(t.run_dir, t.sync())
    original = Delivery._remember

    def remember(self, offset):
        if rng.random() < 0.4:
            raise Killed
        original(self, offset)

    monkeypatch.setattr(Delivery, "_remember", remember)
    kills = 0
    for _ in range(200):
        try:
            Delivery(t.run_dir, "run-a", "digits", location).deliver()
            break
        except Killed:
            kills += 1
    assert kills > 0
    assert histories(location)[0] == expected(20)
    client = store.client(location)
    assert len(client.search_runs([store.experiment(client, location, "digits").experiment_id])) == 1


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(location):
    t = tracker(location)
    log(t, range(4))
    length = t.sync()
    t.commit(length)
    log(t, range(4, 6))
    t.sync()  # after the checkpoint: lost by the kill
    t._courier.stop(60)

    t = tracker(location)
    t.resume(length)
    assert deliver.committed(t.run_dir) == length
    log(t, range(4, 8))
    assert t.finish("FINISHED")
    points, run = histories(location)
    assert points == expected(8)
    assert run.info.status == "FINISHED"


def test_a_finished_run_that_falls_back_repeats_nothing(location):
    """Extending a run, or starting again from the checkpoint before the last, replays lines that MLflow has."""
    t = tracker(location)
    t.params({"limit": 4})
    log(t, range(4))
    length = t.sync()
    log(t, range(4, 6))
    t.finish("FAILED")
    assert histories(location)[1].info.status == "FAILED"
    t = tracker(location)
    t.resume(length)
    assert deliver.committed(t.run_dir) == deliver.delivered(t.run_dir) == length
    t.params({"limit": 5})
    log(t, range(4, 9))
    assert t.finish("FINISHED")
    points, run = histories(location)
    assert points == expected(9)
    assert run.info.status == "FINISHED"
    assert run.data.params["limit"] == "4"
    assert run.data.tags["changed.limit"] == "5"


def test_what_a_killed_upload_left_is_swept(location):
    t = tracker(location)
    t.text("figures/a.csv", "x\n", "matrix")
    t.commit(t.sync())
    t.close()
    (folder,) = (location.root / "artifacts").rglob("matrix")
    (folder / ".artifact.uploading.abc").write_text("half")
    t = tracker(location)
    t.text("figures/b.csv", "x\n", "matrix")
    assert t.finish("FINISHED")
    assert sorted(p.name for p in folder.iterdir()) == ["a.csv", "b.csv"]


@pytest.fixture
def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_unreachable_server_is_told_once_and_served_later(location, closed_port):
    away = store.locate(location.root, f"http://user:secret@127.0.0.1:{closed_port}")
    problems = []
    t = tracker(away, problems=problems, root=location.root)
    began = time.monotonic()
    for step in range(6):
        log(t, [step])
        t.commit(t.sync())
    assert not t.finish("FINISHED")
    assert time.monotonic() - began < 20
    assert len(problems) == 1
    assert "cmoe sync run-a" in problems[0]
    assert "secret" not in problems[0]
    assert "\n" not in problems[0]

    assert sync(t.run_dir, "run-a", "digits", location) > 0
    assert sync(t.run_dir, "run-a", "digits", location) == 0
    points, run = histories(location)
    assert points == expected(6)
    assert run.info.status == "FINISHED"
    assert b"secret" not in (t.run_dir / "delivered.json").read_bytes()


def test_any_error_of_mlflow_leaves_the_run_alone(location, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("disk\nfull")

    monkeypatch.setattr(store, "open_run", broken)
    problems = []
    t = tracker(location, problems=problems)
    log(t, range(3))
    t.commit(t.sync())
    assert not t.finish("FINISHED")
    assert problems[0].endswith("(RuntimeError: disk full)")
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sync(t.run_dir, "run-a", "digits", location)
    assert histories(location)[0] == expected(3)


def test_without_a_location_everything_stays_in_the_folder(tmp_path):
    t = tracker(None, root=tmp_path)
    log(t, range(3))
    t.commit(t.sync())
    assert t.finish("FINISHED")
    assert sorted(p.name for p in t.run_dir.iterdir()) == ["committed.json", "wal.jsonl"]


def test_a_run_deleted_in_mlflow_is_delivered_again_as_a_whole(location):
    t = tracker(location)
    log(t, range(3))
    t.commit(t.sync())
    t._courier.stop(60)
    client = store.client(location)
    client.delete_run(histories(location)[1].info.run_id)
    t = tracker(location)
    t.resume(deliver.committed(t.run_dir))
    log(t, range(3, 5))
    t.finish("FINISHED")
    assert histories(location)[0] == expected(5)


def test_two_servers_each_get_everything(location, template, tmp_path):
    other = store.locate(tmp_path / "other")
    other.root.mkdir()
    os.link(template, other.root / "mlflow.db.src")
    (other.root / "mlflow.db").write_bytes((other.root / "mlflow.db.src").read_bytes())
    t = tracker(location)
    log(t, range(3))
    t.finish("FINISHED")
    assert sync(t.run_dir, "run-a", "digits", other) > 0
    assert histories(location)[0] == histories(other)[0] == expected(3)
