"""The commands that need no run: list, show, validate, new-task, doctor."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from cmoe.cli import main, reference
from cmoe.plugins import KINDS, PLURALS, REQUIRED, Catalogue, builtin_folder

from .test_main import TASK


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMOE_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    got, out, _ = run(capsys, *arguments, "--json")
    assert got == code
    return json.loads(out)


@pytest.mark.parametrize("kind", KINDS)
def test_list_names_every_component(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = Catalogue().entries(kind)
    code, out, _ = run(capsys, "list", PLURALS[kind])
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(entries)
    rows = document(capsys, "list", kind)
    assert [(r["kind"], r["name"], r["summary"]) for r in rows] == [(kind, e.name, e.summary) for e in entries.values()]


def test_list_all_and_configs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "list")
    assert all(f"{PLURALS[k]}\n" in out for k in KINDS)
    names = {r["name"] for r in document(capsys, "list", "configs")}
    assert names == {
        p.relative_to(builtin_folder("configs")).with_suffix("").as_posix()
        for p in builtin_folder("configs").rglob("*.yaml")
    }


def test_list_names_a_broken_plugin_and_imports_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.py").write_text(TASK)
    (folder / "tasks" / "bad.py").write_text("def (\n")
    code, out, err = run(capsys, "list", "tasks")
    assert code == 0
    assert "A task of mine." in out
    assert "imported" not in out
    assert err.startswith(f"cmoe: {folder / 'tasks' / 'bad.py'}: line 1")
    assert len(err.splitlines()) == 1
    _, out, _ = run(capsys, "show", "mine")
    assert "how large." in out
    assert "cmoe_plugins.task.mine" not in sys.modules


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_every_option(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in Catalogue().entries(kind).values():
        code, out, _ = run(capsys, "show", f"{kind}/{entry.name}")
        assert code == 0
        flat = " ".join(out.split())
        for option in entry.options().values():
            default = "required" if option.default is REQUIRED else "default"
            assert f" {option.name}: {option.type.describe()}; {default}" in flat
            assert " ".join(option.meaning.split()) in flat
        shown = document(capsys, "show", f"{kind}/{entry.name}")
        assert [o["name"] for o in shown["options"]] == list(entry.options())


@pytest.mark.parametrize("name", ["trainer", "config", "moe", "tracking", "checkpoint", "evaluation", "section/model"])
def test_show_sections(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = document(capsys, "show", name)
    assert shown["kind"] == "section"
    assert all(o["meaning"] for o in shown["options"])


def test_show_asks_which_where_kinds_share_a_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "replay.py").write_text(TASK)
    code, _, err = run(capsys, "show", "replay")
    assert code == 2
    assert "task/replay or strategy/replay" in err
    assert run(capsys, "show", "task/replay")[0] == 0


def test_validate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.yaml").write_text("stream: split_digits\nstrategy: [replay]\n")
    code, out, _ = run(capsys, "validate", "c.yaml", "trainer.epochs=2")
    assert code == 0
    assert "valid" in out
    assert len(out.splitlines()) == 1
    found = document(capsys, "validate", "c.yaml", "trainer.epochs=2")
    assert found["config"]["trainer"]["epochs"] == 2
    _, text, _ = run(capsys, "validate", "c.yaml", "--resolved", "trainer.epochs=2")
    (folder / "again.yaml").write_text(text)
    assert document(capsys, "validate", "again.yaml")["hash"] == found["hash"]


def test_the_configurations_that_come_with_cmoe_are_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(builtin_folder("configs").rglob("*.yaml")):
        code, _, err = run(capsys, "validate", str(path))
        assert (code, err) == (0, ""), path


def test_a_new_task_and_its_test_pass_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = document(capsys, "new-task", "my_points", "--dir", str(folder / "sub"))
    assert (folder / "sub" / "tasks" / "my_points.py").samefile(written["plugin"])
    spec = importlib.util.spec_from_file_location("written_test_of_my_points", written["test"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [f for n, f in vars(module).items() if n.startswith("test_")]
    assert len(tests) >= 3
    for test in tests:
        test(**({"tmp_path": folder} if "tmp_path" in test.__code__.co_varnames else {}))
    before = Path(written["plugin"]).read_text()
    code, _, err = run(capsys, "new-task", "my_points", "--dir", str(folder / "sub"))
    assert code == 2
    assert "is there already" in err
    assert Path(written["plugin"]).read_text() == before


@pytest.mark.parametrize("name", ["a", "task", "my_points2", "x_1"])
def test_names_of_new_tasks_make_classes(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "new-task", name)[0] == 0
    found = Catalogue()
    assert found.broken == []
    assert found.find("task", name).attr.isidentifier()


def test_doctor_is_content_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "MNIST" / "raw").mkdir(parents=True)
    report = document(capsys, "doctor", "--data", str(folder / "data"))
    assert report["ok"]
    topics = {f["topic"]: f for f in report["findings"]}
    assert {"python", "torch", "threads", "devices", "data", "disk", "mlruns", "components"} <= set(topics)
    assert ": MNIST; not there:" in topics["data"]["text"]


def test_doctor_finds_what_is_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks" / "bad.py").write_text("def (\n")
    (folder / "mlruns").mkdir()
    (folder / "mlruns" / "mlflow.db").write_bytes(b"not a database at all" * 99)
    report = document(capsys, "doctor", code=1)
    bad = {f["topic"]: f["text"] for f in report["findings"] if f["state"] == "bad"}
    assert "bad.py" in bad["plugin"]
    assert "mlflow.db" in bad["mlruns"]
    (folder / "mlruns" / "mlflow.db").unlink()
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as db:
        db.execute("create table runs (id)")
    (folder / "tasks" / "bad.py").unlink()
    assert document(capsys, "doctor")["ok"]


def test_the_component_reference_names_every_option(folder: Path) -> None:
    text = reference.components()
    for kind in KINDS:
        for entry in Catalogue().entries(kind).values():
            assert f"### {entry.name}" in text
            assert all(f"| `{o}` |" in text for o in entry.options())
    assert text == reference.components()
