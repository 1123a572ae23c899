"""Starting MLflow's UI light and local, and opening it where the comparison is.

The link opens the experiment's charts with the runs grouped by strategy: a line per strategy with a band over its seeds,
since the step of every metric is the experience. What the charts show is written as the experiment's tag
`mlflow.sharedViewState.<key>`, MLflow's own format for shared views (internal, here as of MLflow 3.17); where another
version ignores it the link still opens the charts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from cmoe.tracking.store import locate

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VIEW_KEY = "cmoe"
MAX_TAG = 20_000  # characters that MLflow allows in an experiment's tag

# (title, metric) of the charts on top, those whose metric the experiment has
CHARTS = (
    ("Accuracy over experiences so far, no task label", "class_il/acc_macro"),
    ("Forgetting, no task label", "class_il/forgetting_chaudhry"),
    ("Accuracy over experiences so far, task label given", "task_il/acc_macro"),
    ("Forgetting, task label given", "task_il/forgetting_chaudhry"),
    ("Bits per byte over domains so far", "bits_per_byte/bpb_macro"),
    ("Forgetting in bits per byte", "bits_per_byte/forgetting_chaudhry"),
    ("Next-byte accuracy", "next_byte_accuracy/acc_macro"),
    ("Training loss", "train/loss"),
    ("Parameters", "model/parameters_total"),
)


def command(root: str | Path = "mlruns", port: int = 5000, uri: str | None = None) -> tuple[list[str], dict[str, str]]:
    """What starts the UI on localhost: the command and its environment.

    One worker and no job runner: 11 s and 0.5 GB instead of 44 s and 2.5 GB.
    """
    location = locate(root, uri)
    arguments = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", location.uri]
    arguments += ["--default-artifact-root", (location.root / "artifacts").as_uri()]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return arguments, environment


def experiment_link(base: str, experiment_id: str, key: str | None = VIEW_KEY) -> str:
    """The address of the experiment's chart view.

    Args:
        base: of the server, e.g. `http://127.0.0.1:5000`.
        key: of the saved view; None opens MLflow's default charts.
    """
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if key:
        query["viewStateShareKey"] = key
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def save_chart_view(
    client: MlflowClient, experiment_id: str, group_by: Sequence[str] = ("strategy",), key: str = VIEW_KEY
) -> bool:
    """Writes the chart view of an experiment, for the metrics that its newest runs have.

    Args:
        group_by: parameters that make a group.

    Returns:
        Whether it was written; there may be no runs yet, or more than a tag holds.
    """
    runs = client.search_runs([experiment_id], max_results=20)
    metrics = {name for run in runs for name in run.data.metrics}
    if not metrics:
        return False
    text = json.dumps(chart_view(metrics, group_by), separators=(",", ":"))
    if len(text) > MAX_TAG:
        return False
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", text)
    return True


def chart_view(metrics: set[str], group_by: Sequence[str] = ("strategy",)) -> dict[str, Any]:
    """MLflow's state of the runs page: grouped runs, our charts on top, all other sections folded."""
    top = "cmoe-section-comparison"
    charts = [
        _line(f"cmoe-chart-{k}", top, title, metric) for k, (title, metric) in enumerate(CHARTS) if metric in metrics
    ]
    sections = [{"uuid": top, "name": "Comparison", "display": True, "isReordered": True, "columns": 2}]
    others = sorted({name.rpartition("/")[0] for name in metrics} - {""})
    sections += [
        {"uuid": f"cmoe-section-{k}", "name": s, "display": False, "isReordered": True} for k, s in enumerate(others)
    ]
    sections.append({"uuid": "cmoe-section-rest", "name": "Model metrics", "display": False, "isReordered": True})
    columns = ["params.`strategy`", "params.`label`", "params.`seed`"]
    columns += [f"metrics.`{metric}`" for _, metric in CHARTS[:6] if metric in metrics]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": name} for name in group_by],
        },
        "groupsExpanded": {},
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _line(uuid: str, section: str, title: str, metric: str) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "type": "LINE",
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "displayName": title,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "displayPoints": True,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def artifact_link(base: str, experiment_id: str, mlflow_run: str, path: str = "figures/matrix_class_il.png") -> str:
    """The address of one artifact of a run, e.g. its heat map."""
    page = f"#/experiments/{experiment_id}/runs/{mlflow_run}/artifacts/{path}"
    return f"{base.rstrip('/')}/{page}?{urlencode({'workflowType': 'machine_learning'})}"
