"""Runs of an experiment beside each other."""

from __future__ import annotations

import json
import re

import pytest
from scipy import stats

from cmoe.errors import UserError
from cmoe.tracking import diagnostics
from cmoe.tracking.compare import choose, compare, headline_metrics, picture, table
from cmoe.tracking.figures import png
from cmoe.tracking.report import report
from cmoe.tracking.summary import load_runs, read_run

from .documents import document
from .runs import write_run


@pytest.fixture
def root(tmp_path):
    for label in ("replay", "naive"):
        for seed in range(3):
            write_run(tmp_path, label, seed)
    write_run(tmp_path, "naive", 0, experiment="other")
    write_run(tmp_path, "replay", 9, status="RUNNING")
    return tmp_path


def test_means_intervals_and_paired_differences(root):
    runs = load_runs(root, "digits")
    result = compare(runs)
    assert json.loads(json.dumps(result)) == result
    assert result["baseline"] == "naive"
    assert result["seeds"] == {"naive": [0, 1, 2], "replay": [0, 1, 2]}
    cell = result["metrics"]["class_il/acc_macro"]["replay"]
    values = {
        label: [r.metrics["class_il/acc_macro"] or 0.0 for r in runs if r.label == label]
        for label in ("naive", "replay")
    }
    low, high = stats.t.interval(0.95, 2, loc=sum(values["replay"]) / 3, scale=stats.sem(values["replay"]))
    assert (cell["low"], cell["high"]) == pytest.approx((low, high))
    paired = stats.ttest_rel(values["replay"], values["naive"]).confidence_interval(0.95)
    assert (cell["difference"]["low"], cell["difference"]["high"]) == pytest.approx(tuple(paired))
    assert result["metrics"]["class_il/acc_macro"]["naive"]["difference"] is None
    assert result["costs"]["naive"] == {"parameters_total": 1001.0, "parameters_active": 500.0, "wall_seconds": 2.5}
    assert "class_il/intransigence" not in result["metrics"]  # nobody has it


def test_a_metric_that_one_seed_lacks_has_no_silent_mean(root):
    write_run(root, "replay", 3, metrics={"class_il/acc_macro": None}, reasons={"class_il/acc_macro": "not evaluated"})
    result = compare(load_runs(root, "digits"))
    cell = result["metrics"]["class_il/acc_macro"]["replay"]
    assert cell["mean"] is None
    assert cell["missing"] == "not evaluated (seed 3)"
    assert result["metrics"]["class_il/acc_macro"]["naive"]["mean"] is not None


def test_table_is_text_in_percent(root):
    header, rows = table(compare(load_runs(root, "digits"), baseline="replay"))
    assert header == ["label", "seeds", "class_il/acc_macro", "Δ to replay", "class_il/forgetting_chaudhry", "Δ to replay", "parameters", "seconds"]  # fmt: skip
    assert all(len(row) == len(header) for row in rows)
    naive = rows[1]
    assert naive[:2] == ["naive", "3"]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", naive[2])
    assert re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d", naive[3])
    assert (rows[0][0], rows[0][3]) == ("replay", "–")


def test_of_two_runs_with_the_same_settings_and_seed_the_newer_counts(root):
    write_run(root, "naive", 0, keep=0.9, created=5.0, run_id="digits-naive-s0-bbbbbb")
    runs, notes = choose(load_runs(root, "digits"))
    assert [r.run_id for r in runs if r.label == "naive" and r.seed == 0] == ["digits-naive-s0-bbbbbb"]
    assert len(notes) == 1
    assert notes[0].endswith("left out: digits-naive-s0-aaaaaa")


def test_runs_of_other_settings_are_not_averaged(root):
    """One label, several settings: each is a row of its own, named by what differs."""
    other = {"trainer": {"epochs": 12}, "tracking": {"root": "elsewhere"}}
    for seed in (0, 1):
        config = {"seed": seed, "strategy": [{"name": "replay"}], **other}
        write_run(root, "replay", seed, created=5.0, run_id=f"digits-replay-s{seed}-b", config=config)
    runs, notes = choose(load_runs(root, "digits"))
    result = compare(runs)
    assert notes == []
    assert result["seeds"] == {
        "naive": [0, 1, 2],
        "replay (trainer.epochs=unset)": [0, 1, 2],
        "replay (trainer.epochs=12)": [0, 1],
    }
    cell = result["metrics"]["class_il/acc_macro"]["replay (trainer.epochs=12)"]
    assert (cell["n"], cell["difference"]["n"]) == (2, 2)


def test_what_is_only_measured_tells_no_runs_apart(root):
    asked = {"diagnostics": "all", "diagnostics_samples": 32, "rows": "all"}
    for seed, evaluation in ((7, asked), (8, {"diagnostics": "routing", "diagnostics_samples": 512, "rows": "all"})):
        config = {"seed": seed, "strategy": [{"name": "asked"}], "evaluation": evaluation}
        write_run(root, "asked", seed, config=config)
    runs, notes = choose([run for run in load_runs(root, "digits") if run.label == "asked"])
    assert compare(runs)["seeds"] == {"asked": [7, 8]}
    assert notes == []


def test_the_settings_that_tell_most_are_named(root):
    """Two of six keys tell four settings apart; the others would make the labels long and say nothing more."""
    for i in range(4):
        config = {"strategy": [{"name": "many"}], "a": i > 0, "b": i > 0, "model": {"x": i // 2, "y": i % 2}}
        write_run(root, "many", 0, run_id=f"digits-many-{i}", config=config)
    labels = compare(choose(load_runs(root, "digits"))[0])["labels"]
    assert [label for label in labels if label.startswith("many")] == [
        f"many (model.x={i // 2}, model.y={i % 2})" for i in range(4)
    ]


def test_more_settings_than_a_label_can_show_get_numbers(root):
    for i in range(16):
        bits = {f"b{k}": i >> k & 1 for k in range(4)}
        write_run(root, "many", 0, run_id=f"digits-many-{i:02}", config={"strategy": [{"name": "many"}], "model": bits})
    labels = [label for label in compare(choose(load_runs(root, "digits"))[0])["labels"] if label.startswith("many (")]
    assert len(labels) == 16
    assert sum(label.endswith(" #2") for label in labels) == 8


def test_another_stream_or_evaluation_is_said(root):
    write_run(root, "replay", 3, config={"stream": {"limit": 3}, "evaluation": {"split": "validation"}})
    _, notes = choose(load_runs(root, "digits"))
    assert notes == ["the runs are not of one stream and evaluation, they differ in: stream.limit, evaluation.split"]


def test_a_difference_of_fewer_pairs_says_how_many(root):
    write_run(root, "replay", 3)
    _, rows = table(compare(choose(load_runs(root, "digits"))[0]))
    replay = next(row for row in rows if row[0] == "replay")
    assert replay[1] == "4"
    assert replay[3].endswith("(n=3)")


def test_damaged_folders_are_left_out(root):
    (root / "runs" / "broken").mkdir()
    (root / "runs" / "broken" / "run.json").write_text("{")
    (root / "runs" / "empty").mkdir()
    assert read_run(root / "runs" / "broken") is None
    (root / "runs" / "digits-naive-s1-aaaaaa" / "rows" / "row_0001.safetensors").write_bytes(b"x")
    runs = load_runs(root, "digits")
    assert len(runs) == 6
    assert sum(not run.matrices for run in runs) == 1
    assert png(picture(runs, compare(runs))).startswith(b"\x89PNG")


def test_wrong_names_say_what_there_is(root):
    with pytest.raises(UserError, match=r"digits, other.*did you mean 'digits'"):
        load_runs(root, "digit")
    with pytest.raises(UserError, match=r"baseline: expected one of naive, replay, got 'naiv'"):
        compare(load_runs(root, "digits"), baseline="naiv")
    with pytest.raises(UserError, match="there are no runs yet"):
        load_runs(root / "nowhere", "digits")
    write_run(root, "naive", 0, experiment="going", status="RUNNING")
    with pytest.raises(UserError, match="expected finished runs, its 1 runs are RUNNING"):
        load_runs(root, "going")


def test_the_report_shows_the_experts_of_each_label_that_has_some(root):
    runs = load_runs(root, "digits")
    assert "<h2>Experts</h2>" not in report(runs, compare(runs))
    for label, level in (("replay", "all"), ("naive", "routing")):
        for seed in range(3):
            rows = root / "runs" / f"digits-{label}-s{seed}-aaaaaa" / "rows"
            diagnostics.save(rows, document(layers=1, experiences=2, seed=seed))  # not the last row
            diagnostics.save(rows, document(layers=1, experiences=3, level=level, seed=seed))
    runs = load_runs(root, "digits")
    assert [run.experts["row"] for run in runs] == [2] * 6
    assert load_runs(root, "digits", matrices=False)[0].experts is None
    html = report(runs, compare(runs))
    assert html.count("<h2>Experts</h2>") == 1
    for what in ("drop one, replay", "calibration of replay", "similarity of experts, replay"):
        assert html.count(f'alt="{what}"') == 1
    assert "drop one, naive" not in html


def test_the_report_is_self_contained_and_escapes(root):
    evil = "<script>alert('x')</script>$"
    write_run(root, evil, 0, config={"stream": {"path": "</pre><img src=x onerror=1>"}}, run_id="digits-evil-s0")
    runs = load_runs(root, "digits")
    result = compare(runs)
    html = report(runs, result, title="A & <B>")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert" in html
    assert "<title>A &amp; &lt;B&gt;</title>" in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert "http://" not in html
    assert "https://" not in html
    for name in headline_metrics(result):
        assert name in html
    for run in runs:
        assert run.run_id in html
