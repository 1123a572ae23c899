"""The folder of a run: its name, its facts, who holds it, how it is found."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest

from cmoe.errors import UserError
from cmoe.rundir import RunFolder, create, find, now, runs, slug, write_whole

HASH = "0123456789abcdef"


def made(root: Path, experiment: str = "digits", label: str = "naive", seed: int = 0, created: str = "") -> RunFolder:
    folder = create(root, experiment, label, seed, HASH)
    folder.update(run_id=folder.id, created=created or now())
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("two words", "two-words"),
        ("a/b\\c", "a-b-c"),
        ("../../etc/passwd", "etc-passwd"),
        ("Ä ö", "run"),
        ("", "run"),
        ("...", "run"),
        ("x" * 500, "x" * 60),
        ("replay+expand, size=3", "replay-expand-size-3"),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_each_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [create(tmp_path, "my digits", "a+b", 3, HASH).id for _ in range(3)]
    assert names == ["my-digits-a-b-s3-012345", "my-digits-a-b-s3-012345-2", "my-digits-a-b-s3-012345-3"]
    assert (tmp_path / "runs" / names[0]).is_dir()


def _create(arguments: tuple[Path, int]) -> list[str]:
    root, count = arguments
    return [create(root, "e", "l", 0, HASH).id for _ in range(count)]


def test_processes_that_create_at_once_never_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        names = [n for part in pool.map(_create, [(tmp_path, 20)] * 3) for n in part]
    assert len(set(names)) == 60


def test_a_root_that_cannot_be_a_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"tracking\.root: expected a folder that can be written"):
            create(root, "e", "l", 0, HASH)


def test_find_by_id_beginning_folder_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path, label="naive", created="2024-01-01T00:00:00+00:00")
    second = made(tmp_path, label="replay", created="2024-01-03T00:00:00+00:00")
    third = made(tmp_path, label="expand", created="2024-01-02T00:00:00+00:00")
    again = made(tmp_path, label="naive", created="2023-01-01T00:00:00+00:00")
    assert [r.id for r in runs(tmp_path)] == [again.id, first.id, third.id, second.id]
    assert find(tmp_path, "last").id == second.id
    assert find(tmp_path, "digits-rep").id == second.id
    assert find(tmp_path, first.id).id == first.id  # although another begins so
    assert find(tmp_path, str(third.path)).id == third.id
    assert find(tmp_path, f"{third.path}/").id == third.id
    monkeypatch.chdir(third.path)
    assert find(tmp_path, ".").id == third.id


def test_runs_of_the_same_second_keep_their_order(tmp_path: Path) -> None:
    made(tmp_path, label="b")
    last = made(tmp_path, label="a")
    assert now() != now()[:19]
    times = [json.loads((r.path / "run.json").read_text())["created"] for r in runs(tmp_path)]
    assert times == sorted(times)
    if times[0] < times[1]:  # a millisecond apart
        assert find(tmp_path, "last").id == last.id


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits-naive", r"expected one run, 2 begin so: digits-naive-s0-012345.*, digits-naive-s1"),
        ("digits", r"expected one run, 3 begin so"),
        ("", r"expected one run, 3 begin so"),
        ("digits-replai-s0-012345", r"not in .*did you mean 'digits-replay-s0-012345'"),
        ("nothing like it", r"run 'nothing like it': not in"),
    ],
)
def test_a_name_that_is_not_one_run(name: str, said: str, tmp_path: Path) -> None:
    made(tmp_path, label="naive", seed=0)
    made(tmp_path, label="naive", seed=1)
    made(tmp_path, label="replay")
    with pytest.raises(UserError, match=said):
        find(tmp_path, name)


def test_no_runs_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no runs in .*; start one with: cmoe run"):
        find(tmp_path, "last")


def test_a_folder_killed_before_it_had_facts_is_no_run(tmp_path: Path) -> None:
    create(tmp_path, "e", "l", 0, HASH)
    known = made(tmp_path)
    assert [r.id for r in runs(tmp_path)] == [known.id]


def test_damaged_facts_are_named(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder.path / "run.json").write_text('{"created": ')
    for read in (folder.facts, lambda: folder.update(status="RUNNING")):
        with pytest.raises(UserError, match=r"run\.json: expected JSON"):
            read()
    assert [r.id for r in runs(tmp_path)] == [folder.id]  # one damaged run hides no other
    with pytest.raises(UserError, match=r"expected a run's folder, but run\.json is not there"):
        RunFolder(tmp_path).facts()


def test_facts_change_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)
    folder.update(status="RUNNING", note="ä")
    assert folder.update(status="FINISHED")["note"] == "ä"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.update(status="FAILED")
    assert folder.facts()["status"] == "FINISHED"
    monkeypatch.undo()
    with pytest.raises(ValueError):
        folder.update(metric=float("nan"))  # would not be JSON
    assert folder.facts() == folder.facts()
    assert "metric" not in folder.facts()


def test_write_whole_leaves_nothing_beside(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "two")]


def _hold(path: Path, ready: Any, leave: Any) -> None:
    with RunFolder(path).working():
        ready.set()
        leave.wait(30)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = made(tmp_path)
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(folder.path, ready, leave))
    holder.start()
    assert ready.wait(30)
    said = re.escape(f"run {folder.id}: another process is working on it")
    with pytest.raises(UserError, match=said), folder.working():
        pass
    holder.kill()  # a killed holder holds nothing
    holder.join()
    with folder.working():
        pass


def test_the_hold_ends_with_an_error(tmp_path: Path) -> None:
    folder = made(tmp_path)
    with pytest.raises(RuntimeError), folder.working():
        raise RuntimeError
    with folder.working():
        pass
