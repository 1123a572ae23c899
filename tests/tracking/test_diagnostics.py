"""Metrics, table and pictures of what was measured of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from cmoe.tracking import diagnostics, figures, layout
from cmoe.tracking.figures import RouterLoad, png

from .documents import document
from .helpers import histories, tracker


def test_a_metric_is_the_mean_over_layers_and_counts_are_sums():
    d = document()
    first, second = d["layers"].values()
    second["dead"] = [1, 2]
    values = {name: v.value for name, v in diagnostics.values(d).items()}
    assert values["router/load_cv"] == pytest.approx((first["load_cv"] + second["load_cv"]) / 2)
    assert values["router/dead_experts"] == 3
    assert values["experts/flops_per_token"] == first["flops_per_token"] + second["flops_per_token"]
    assert values["calibration/model_ece"] == d["model"]["ece"]
    alone = [[a["ece"] for a in layer["alone"]] for layer in (first, second)]
    assert values["calibration/alone_ece"] == pytest.approx(np.mean(alone))
    pools = [layer["pools"]["log"]["nll"] for layer in (first, second)]
    assert values["calibration/log_pool_nll"] == pytest.approx(np.mean(pools))
    without = [[a["accuracy"] for a in layer["without"]] for layer in (first, second)]
    assert values["experts/drop_one_accuracy"] == pytest.approx(np.mean(without))
    assert values["experts/drop_one_worst"] == pytest.approx(np.min(without, axis=1).mean())


def test_layers_have_metrics_of_their_own_where_there_are_several():
    d = document()
    found = diagnostics.metrics(d)
    assert found["router/blocks.1.mlp/load_cv"] == d["layers"]["blocks.1.mlp"]["load_cv"]
    assert found["calibration/blocks.0.mlp/gate_pool_brier"] == d["layers"]["blocks.0.mlp"]["pools"]["gate"]["brier"]
    assert not [name for name in found if "mlp/model_" in name]
    assert not [name for name in diagnostics.metrics(document(layers=1)) if "mlp" in name]


def test_routing_alone_has_no_metrics_of_experts():
    names = diagnostics.values(document(level="routing"))
    assert set(names) == set(diagnostics.ROUTER)


def test_what_is_absent_has_its_reason():
    d = document(layers=1)
    layer = d["layers"]["blocks.0.mlp"]
    layer |= {"dropped_share": None, "task_information_normalised": None, "cka": None, "without": []}
    layer["reasons"] = {"drop_one": "the router refuses"}
    reasons = {name: v.reason for name, v in diagnostics.values(d).items() if v.reason}
    assert reasons == {
        "router/dropped_share": "no router has a capacity",
        "router/task_information_normalised": "needs two experiences and two experts that are used",
        "experts/cka": "needs two experts whose output is not constant",
        "experts/drop_one_accuracy": "the router refuses",
        "experts/drop_one_worst": "the router refuses",
    }
    soft = {"experts": [0, 1], "reasons": {"router": "routing of kind 'soft'", "experts": "no token of one expert"}}
    d["layers"] = {"blocks.0.mlp": soft}
    reasons = {name: v.reason for name, v in diagnostics.values(d).items()}
    assert reasons["router/load_cv"] == "routing of kind 'soft'"
    assert reasons["experts/cosine"] == reasons["calibration/alone_ece"] == "routing of kind 'soft'"
    assert reasons["calibration/model_ece"] is None
    d |= {"model": None, "reasons": {"experts": "strategy Separate has its own way to predict"}}
    reasons = {name: v.reason for name, v in diagnostics.values(d).items()}
    assert reasons["calibration/model_ece"] == "strategy Separate has its own way to predict"


def test_the_table_has_every_number_once():
    d = document(layers=2, experts=3, experiences=2)
    rows = diagnostics.table([document(experiences=1), d])
    assert len({row[:-1] for row in rows}) == len(rows)
    assert {row[0] for row in rows} == {0, 1}
    found = {row[1:-1]: row[-1] for row in rows if row[0] == 1}
    layer = d["layers"]["blocks.1.mlp"]
    assert found["blocks.1.mlp", 2, "", 1, "load"] == layer["load"][1][2]
    assert found["blocks.1.mlp", 0, 2, "", "cka"] == layer["pairs"]["cka"][0][2]
    assert found["blocks.1.mlp", 1, "", 0, "without_accuracy"] == layer["without"][1]["accuracies"][0]
    assert found["blocks.1.mlp", "", "", "", "uniform_pool_nll"] == layer["pools"]["uniform"]["nll"]
    assert found["", "", "", 0, "drift"] == d["drift"][0]
    assert ("", "", "", 1, "drift") not in found  # nothing to compare with yet
    assert ("blocks.1.mlp", 0, "", "", "purity") not in found


def test_documents_lie_beside_their_rows(tmp_path):
    first, second = document(experiences=1), document(experiences=2)
    for d in (second, first):
        diagnostics.save(tmp_path, d)
    assert diagnostics.load(tmp_path, [1, 0, 5]) == [first, second]
    assert list(first["layers"]) == list(diagnostics.load(tmp_path, [0])[0]["layers"])
    with pytest.raises(ValueError, match="JSON"):
        diagnostics.save(tmp_path, {**first, "drift": [float("nan")]})


def test_everything_of_experts_has_its_place(location):
    t = tracker(location)
    t.run_dir.mkdir(parents=True)
    documents = [document(experiences=n, seed=n) for n in (1, 2)]
    for d in documents:
        t.metrics(diagnostics.metrics(d), d["row"])
    pictures = layout.log_diagnostics(t, documents, "run-a")
    assert [p.name for p in pictures] == ["expert_similarity.png", "drop_one_expert.png", "expert_calibration.png"]
    assert t.finish("FINISHED")
    points, _ = histories(location)
    assert points["router/load_cv"] == [(d["row"], diagnostics.values(d)["router/load_cv"].value) for d in documents]
    assert points["calibration/model_nll"] == [(d["row"], d["model"]["nll"]) for d in documents]
    saved = json.loads((t.run_dir / "figures" / "diagnostics.json").read_text())
    assert saved == {"rows": documents}
    header, *lines = (t.run_dir / "figures" / "diagnostics.csv").read_text().splitlines()
    assert header == "after,layer,expert,other,experience,name,value"
    assert len(lines) == len(diagnostics.table(documents))


def test_nothing_is_drawn_of_what_was_not_asked(location):
    t = tracker(location)
    t.run_dir.mkdir(parents=True)
    assert layout.log_diagnostics(t, [document(level="routing")], "run-a") == []
    alone = document(experts=2)
    for layer in alone["layers"].values():
        layer["experts"] = [7]
    assert diagnostics.similarities(alone) == []
    assert t.finish("FINISHED")


@pytest.mark.parametrize(
    ("layers", "experts", "experiences"), [(1, 1, 1), (2, 3, 2), (9, 4, 2), (1, 20, 14), (1, 13, 2)]
)
def test_pictures_draw_in_every_shape(layers, experts, experiences):
    d = document(layers, experts, experiences)
    drawn = min(layers, diagnostics.DRAWN)
    if experts > 1:
        figure = figures.similarity(diagnostics.similarities(d), "run $1")
        assert len([ax for ax in figure.axes if ax.images]) == 3 * drawn
        assert png(figure, dpi=40)
    figure = figures.drop_one(diagnostics.dropped(d), d["names"], "run $1")
    bars = [p.get_height() for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    layer = d["layers"]["blocks.0.mlp"]
    assert bars == pytest.approx([100 * (d["model"]["accuracy"] - a["accuracy"]) for a in layer["without"]])
    assert png(figure, dpi=40)
    figure = figures.calibration(diagnostics.calibrations(d), "run $1")
    labels = [t.get_text() for t in figure.axes[1].get_yticklabels()]
    alone = [f"expert {e} alone" for e in range(experts)] if experts <= 12 else ["experts alone, mean"]
    assert labels == ["the model", "gate pool", "uniform pool", "log pool", *alone]
    assert png(figure, dpi=40)


def test_of_many_layers_the_first_and_the_last_are_drawn():
    names = [s.layer for s in diagnostics.similarities(document(layers=20, experts=2))]
    assert len(names) == diagnostics.DRAWN
    assert names[0] == "blocks.0.mlp"
    assert names[-1] == "blocks.19.mlp"


def test_numbers_stand_in_the_heat_maps():
    d = document(layers=1, experts=2)
    d["layers"]["blocks.0.mlp"]["pairs"] = {
        "cosine": [[1.0, -0.25], [-0.25, 1.0]],
        "cka": [[1.0, 0.5], [0.5, 1.0]],
        "disagreement": [[0.0, None], [None, 0.0]],
    }
    figure = figures.similarity(diagnostics.similarities(d))
    shown = [[t.get_text() for t in ax.texts if t.get_ha() == "center"] for ax in figure.axes if ax.images]
    assert shown == [["1", "-.25", "-.25", "1"], ["1", ".50", ".50", "1"], ["0", "0"]]


def test_router_load_says_what_experts_tell_about_tasks():
    load = RouterLoad("b0", (0, 1), np.eye(2), (0.693, 1.0), 0.875)
    (ax, _) = figures.router_load([load], ["x", "y"]).axes
    assert "b0\nI(task; expert) 0.69 nats, 100 %\npurity 88 %" in [t.get_text() for t in ax.texts]
    one = RouterLoad("b0", (0,), np.ones((1, 1)), (0.0, None), 1.0)
    assert one.facts() == ["I(task; expert) 0.00 nats", "purity 100 %"]
    assert RouterLoad("b0", (0,), np.ones((1, 1))).facts() == []
