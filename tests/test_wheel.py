"""The wheel: built, installed beside nothing else, and used in an empty folder as a stranger would.

The task plugin is the one of docs/writing_a_task.md, word for word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .docs.blocks import ROOT, write_files

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network and without isolation."""
    folder = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    with_pip = ["-m", "uv", "pip", "install", "--quiet", "--no-deps", "--offline", "--target", str(folder), str(wheel)]
    call([sys.executable, *with_pip], folder.parent)
    return folder


@pytest.fixture(scope="module")
def empty(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """An empty folder, and what runs Python in it with the installed wheel in front of the checkout."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "CMOE_DATA")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return call([sys.executable, *arguments], folder, environment)

    return folder, run


def call(
    command: Sequence[str], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done


def test_what_the_wheel_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cmoe"}  # no top-level `tasks`, `tests` or `configs`
    assert "cmoe/py.typed" in names
    for folder, pattern in (("tasks", "*.py"), ("configs", "**/*.yaml")):
        for path in (ROOT / folder).glob(pattern):
            assert f"cmoe/_builtin/{path.relative_to(ROOT).as_posix()}" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_it_is_the_installed_one(empty: tuple[Path, Run], site: Path) -> None:
    _, run = empty
    where = run("-c", "import cmoe; print(cmoe.__file__)").stdout.strip()
    assert Path(where).is_relative_to(site)
    assert sorted(p.name for p in site.iterdir() if p.name not in ("bin", ".lock") and "dist-info" not in p.name) == [
        "cmoe"
    ]
    listed = json.loads(run("-m", "cmoe.cli.main", "list", "tasks", "--json").stdout)
    assert {e["name"] for e in listed} == {p.stem for p in (ROOT / "tasks").glob("*.py")}
    assert all(Path(e["file"]).is_relative_to(site) for e in listed)


def test_the_quickstart_runs_in_an_empty_folder(empty: tuple[Path, Run]) -> None:
    folder, run = empty
    command = ("run", "quickstart", "--only", "naive", "trainer.epochs=1", "tracking.enabled=false", "--json")
    document = json.loads(run("-m", "cmoe.cli.main", *command).stdout)
    (facts,) = document["runs"]
    assert facts["status"] == "FINISHED"
    assert (folder / "mlruns" / "runs" / facts["run_id"] / "figures" / "matrix_task_il.png").exists()


def test_the_plugin_written_from_the_docs_runs(empty: tuple[Path, Run]) -> None:
    folder, run = empty
    written = [p.relative_to(folder).as_posix() for p in write_files(folder, "writing_a_task.md")]
    assert {"tasks/table.py", "table.yaml", "make_data.py"} <= set(written)
    run("make_data.py")
    assert "A CSV file without a header" in run("-m", "cmoe.cli.main", "show", "table").stdout
    command = ("run", "table.yaml", "--data", "data", "--only", "replay", "tracking.enabled=false", "--json")
    (facts,) = json.loads(run("-m", "cmoe.cli.main", *command).stdout)["runs"]
    assert facts["status"] == "FINISHED"
    assert facts["segments"] == 5
    assert facts["metrics"]["class_il/acc_macro"] > 0.5
    assert facts["config"]["plugins"] == [str((folder / "tasks").resolve())]
