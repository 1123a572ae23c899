"""`cmoe run`, `resume`, `extend` and `reproduce` as a user calls them, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmoe.cli import reproduce
from cmoe.cli.main import main
from cmoe.rundir import find, runs

QUICK = ["trainer.max_steps=3", "tracking.enabled=false"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_study_ends_with_matrices_a_table_a_picture_and_the_way_to_mlflow(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", "quickstart", *QUICK)
    assert code == 0, err
    for label in ("naive", "replay", "expand"):
        assert f"{label}: task_il after each experience" in out
        assert f"[{label}] experience 5/5" in err
    assert "difference to naive" in out
    picture = out.split("picture: ")[1].splitlines()[0]
    report = out.split("report: ")[1].splitlines()[0].strip()
    assert Path(picture).stat().st_size > 10_000
    assert "<html" in Path(report).read_text()
    assert "cmoe ui quickstart" in out.splitlines()[-1]


def test_json_is_one_document_with_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", "quickstart", "--json", "--only", "replay", *QUICK)
    document = json.loads(out)
    assert code == 0
    assert [r["label"] for r in document["runs"]] == ["replay"]
    assert 0 <= document["runs"][0]["metrics"]["task_il/acc_macro"] <= 1


def test_an_interrupted_run_says_how_to_go_on_and_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmoe.cli import console

    whole = call(capsys, "run", "quickstart", "--only", "naive", "--json", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(console.StopFlag, "__call__", lambda self: True)
        code, _, err = call(capsys, "run", "quickstart", "--only", "naive", *QUICK)
    assert code == 130
    name = err.split("cmoe resume ")[1].split()[0]
    assert find(Path("mlruns"), name).facts()["status"] == "INTERRUPTED"
    code, out, _ = call(capsys, "resume", name, "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["metrics"] == json.loads(whole[1])["runs"][0]["metrics"]


def test_extend_takes_the_next_experience(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", "quickstart", "--only", "replay", "stream.limit=4", *QUICK)[0] == 0
    code, out, err = call(capsys, "extend", "last", "task=next")
    assert code == 0, err
    assert "8+9" in out
    code, _, err = call(capsys, "extend", "last", "task=next")
    assert code == 2
    assert "learned all 5 experiences" in err
    assert call(capsys, "extend", "last", "tusk=next")[0] == 2


def test_what_the_data_refuses_leaves_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "run", "quickstart", "stream.experiences=3", *QUICK)
    assert code == 2
    assert "experiences" in err
    assert runs(Path("mlruns")) == []


STUDY = """
experiment: tiny
stream: {name: split_digits, limit: 2}
trainer: {max_steps: 2}
tracking: {enabled: false}
seeds: 2
variants:
  naive: {strategy: naive}
  other: {strategy: replay}
published:
  source: nobody
  tolerance: 3.0
  rows:
    naive: {class_il/acc_macro: 250.0}
    other: {class_il/acc_macro: null}
"""


def test_reproduce_prints_ours_beside_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tiny.yaml").write_text(STUDY)
    code, out, err = call(capsys, "reproduce", "tiny.yaml", "--json", "--jobs", "2")
    assert code == 0, err
    naive, other = json.loads(out)["rows"]
    assert naive["seeds"] == [0, 1]
    assert naive["within"] is False
    assert naive["difference"] == pytest.approx(naive["ours"] - 250.0)
    assert other["within"] is None
    code, out, err = call(capsys, "reproduce", "tiny.yaml", "--jobs", "2")
    assert code == 0, err
    assert "0 of 1 published cells are within the tolerance" in out
    assert err.count("finished before, skipped") == 4


@pytest.mark.parametrize(
    ("values", "published", "within"),
    [([0.80, 0.82], 82.0, True), ([0.80, 0.82], 85.0, False), ([0.7, 0.9], 95.0, True), ([0.8], 82.9, True)],
)
def test_a_cell_is_within_three_points_or_two_standard_errors(
    values: list[float], published: float, within: bool
) -> None:
    from types import SimpleNamespace

    jobs = [
        SimpleNamespace(plan=SimpleNamespace(label="a", seed=s), facts={"metrics": {"m": v}})
        for s, v in enumerate(values)
    ]
    (row,) = reproduce.hold_against({"rows": {"a": {"m": published}}}, jobs)
    assert row["within"] is within
