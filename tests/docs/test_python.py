"""Python in the documents compiles; what is marked `run` runs; the examples do what the text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .blocks import Block, blocks, write_files

BLOCKS = blocks("python")
RUN = [b for b in BLOCKS if "run" in b.marks]
QUICK = ("trainer.epochs=1", "tracking.enabled=false")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=[b.name for b in BLOCKS])
def test_it_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


@pytest.mark.parametrize("block", RUN, ids=[b.name for b in RUN])
def test_it_runs(block: Block, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})
    first = capsys.readouterr().out.split()[0]
    assert 0 <= abs(float(first)) <= 1


def test_the_readmes_plugin_learns_wines(here: Path) -> None:
    import cmoe

    write_files(here, "README.md")
    plugin = next(b for b in BLOCKS if b.page == "README.md" and b.file)
    assert len(plugin.text.rstrip().splitlines()) <= 22
    run = cmoe.run("wines.yaml", "strategy=naive", "tracking.enabled=false")
    assert run.facts()["segments"] == 3
    assert run.facts()["metrics"]["class_il/learning_accuracy"] > 0.9


def test_the_arrays_of_the_data_page_are_learned(here: Path) -> None:
    import cmoe

    write_files(here, "data.md")
    made = next(b for b in BLOCKS if b.page == "data.md")
    exec(compile(made.text, made.name, "exec"), {})
    run = cmoe.run("points.yaml", *QUICK)
    assert run.facts()["segments"] == 3


def test_the_strategy_of_the_docs_acts_and_resumes_exactly(here: Path) -> None:
    import cmoe
    from cmoe import api
    from cmoe.session import Interrupted
    from cmoe.streams.data import data_folder

    write_files(here, "writing_a_strategy.md")
    overrides = ("strategy=anchor", "stream.limit=2", "trainer.chunk=4", *QUICK)
    whole = cmoe.run("anchored.yaml", *overrides, "experiment=whole")

    plan, catalogue = api.plan_of("anchored.yaml", [*overrides, "experiment=cut"])
    asked = iter([False] * 6)  # a segment has five chunks: the user stops within the second
    folder = api.new_run(plan)
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, data_folder(here), stop=lambda: next(asked, True))
    assert folder.facts()["status"] == "INTERRUPTED"
    assert (folder.rows / "row_0000.safetensors").exists()
    assert not (folder.rows / "row_0001.safetensors").exists()
    resumed = api.resume(folder, data_folder(here))
    assert resumed["status"] == "FINISHED"
    assert resumed["metrics"] == whole.facts()["metrics"]

    without = cmoe.run("anchored.yaml", "strategy=naive", *overrides[1:], "experiment=without")
    assert without.facts()["metrics"] != whole.facts()["metrics"]


def test_the_test_of_the_docs_passes(here: Path) -> None:
    write_files(here, "writing_a_task.md")
    path = here / "tests" / "test_table.py"
    module: dict[str, Any] = {"__file__": str(path), "__name__": "test_table"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module)
    (here / "data").mkdir()
    module["test_every_class_comes_once"](here / "data")
