"""How the UI is started, and the view that its link opens."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

from cmoe.tracking import store, ui

from .helpers import tracker


def test_it_listens_on_localhost_with_one_worker_and_no_jobs(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments, environment = ui.command(tmp_path, 5123)
    text = " ".join(arguments)
    assert "--host 127.0.0.1 --port 5123 --workers 1" in text
    assert f"sqlite:///{tmp_path}/mlflow.db" in text
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_the_link_opens_the_charts_in_machine_learning_mode():
    link = urlsplit(ui.experiment_link("http://127.0.0.1:5000/", "7"))
    path, _, query = link.fragment.partition("?")
    assert path == "/experiments/7/runs"
    assert parse_qs(query) == {
        "workflowType": ["machine_learning"],
        "compareRunsMode": ["CHART"],
        "viewStateShareKey": ["cmoe"],
    }
    assert "viewStateShareKey" not in ui.experiment_link("http://h", "7", key=None)


def test_the_saved_view_groups_by_strategy_and_fits_a_tag(location):
    client = store.client(location)
    empty = store.experiment(client, location, "empty").experiment_id
    assert not ui.save_chart_view(client, empty)
    t = tracker(location)
    many = {f"class_il/{k}": 0.5 for k in range(300)}
    t.metrics({"class_il/acc_macro": 0.5, "train/loss": 1.0, "plain": 1.0, **many}, 1)
    t.finish("FINISHED")
    experiment = store.experiment(client, location, "digits").experiment_id
    assert ui.save_chart_view(client, experiment)
    view = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.cmoe"])
    assert view["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "strategy"}]
    assert [c["metricKey"] for c in view["compareRunCharts"]] == ["class_il/acc_macro", "train/loss"]
    sections = {s["uuid"]: s for s in view["compareRunSections"]}
    assert all(sections[c["metricSectionId"]]["display"] for c in view["compareRunCharts"])
    assert {"Comparison", "class_il", "train", "Model metrics"} == {s["name"] for s in sections.values()}


def test_an_artifact_has_an_address():
    assert ui.artifact_link("http://h/", "7", "abc", "figures/a.png") == (
        "http://h/#/experiments/7/runs/abc/artifacts/figures/a.png?workflowType=machine_learning"
    )
