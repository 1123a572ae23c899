"""`cmoe compare`: table, picture and report of an experiment."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from cmoe.cli import main
from cmoe.rundir import runs

from .finished import make


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("compare")
    for seed in (0, 1, 2):
        make(base, "naive", seed)
        make(base, "seen", seed, label="<b>replay</b>")
    make(base, "naive", experiment="other")
    return base / "mlruns"


def compare(capsys: Any, root: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main.main(["compare", "--root", str(root), *arguments]) == code
    return capsys.readouterr()


def test_the_table_says_mean_and_interval_over_the_seeds(root: Path, capsys: Any) -> None:
    out, err = compare(capsys, root, "digits")
    assert err == ""
    values = [
        r.facts()["metrics"]["class_il/acc_macro"]
        for r in runs(root)
        if (r.facts()["experiment"], r.facts()["label"]) == ("digits", "naive")
    ]
    row = next(line for line in out.splitlines() if line.strip().startswith("naive"))
    assert row.split()[1] == "3"
    assert row.split()[2] == f"{100 * statistics.mean(values):.1f}"
    assert "difference to naive, paired over seeds" in out
    assert out.splitlines()[-1] == "MLflow:  cmoe ui digits"
    picture, report = re.findall(r"(?:picture|report): +(\S+)", out)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    html = Path(report).read_text()
    assert "&lt;b&gt;replay&lt;/b&gt;" in html
    assert "<b>replay" not in html
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)


def test_the_document_and_the_baseline(root: Path, capsys: Any) -> None:
    out, _ = compare(capsys, root, "digits", "--json", "--baseline", "<b>replay</b>")
    document = json.loads(out)
    assert document["baseline"] == "<b>replay</b>"
    cell = document["metrics"]["class_il/acc_macro"]["naive"]
    assert cell["n"] == 3
    assert cell["low"] <= cell["mean"] <= cell["high"]
    assert cell["difference"]["n"] == 3
    assert Path(document["picture"]).exists()
    assert Path(document["report"]).exists()


def test_wrong_names(root: Path, tmp_path: Path, capsys: Any) -> None:
    before = sorted(p for p in root.rglob("*") if "reports" in p.parts)
    for arguments, message in (
        (["digit"], "did you mean 'digits'"),
        (["digits", "--baseline", "nave"], "did you mean 'naive'"),
        ([], "the following arguments are required: EXPERIMENT"),
    ):
        out, err = compare(capsys, root, *arguments, code=2)
        assert out == ""
        assert len(err.splitlines()) == 1
        assert message in err
    assert "there are no runs yet" in compare(capsys, tmp_path, "digits", code=2)[1]
    assert sorted(p for p in root.rglob("*") if "reports" in p.parts) == before
    assert list(tmp_path.iterdir()) == []
