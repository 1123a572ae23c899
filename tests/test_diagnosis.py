"""Runs that measure their experts: what is tracked, that no weight depends on it, and that it survives a stop."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe import api, checkpoint
from cmoe.errors import UserError
from cmoe.rundir import RunFolder
from cmoe.session import Interrupted
from cmoe.tracking import diagnostics

from .drawing import undrawn
from .strategies.helpers import PLUGINS, WORLDS, merged

BASE: dict[str, Any] = {
    "stream": {"name": "split_digits", "limit": 3},
    "model": {"name": "mlp", "hidden": [16, 12],
              "moe": {"experts": 3, "router": {"name": "topk", "k": 2, "noise": "shazeer", "capacity": 1.0}}},
    "strategy": ["expand", {"name": "replay", "size": 40}],
    "optimizer": {"name": "adam", "lr": 0.01},
    "trainer": {"epochs": 2, "batch_size": 16, "chunk": 3, "log_every": 0},
    "evaluation": {"diagnostics": "all", "diagnostics_samples": 40},
    "tracking": {"enabled": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    undrawn(monkeypatch.setattr)


def run(*changes: dict[str, Any]) -> RunFolder:
    return api.run(merged(BASE, *changes), plugins=PLUGINS)


def logged(folder: RunFolder) -> dict[tuple[int, str], float]:
    entries = [json.loads(line) for line in folder.wal.read_text().splitlines()]
    return {(e["step"], name): v for e in entries if e["kind"] == "metric" for name, v in e["values"].items()}


def documents(folder: RunFolder) -> list[dict[str, Any]]:
    return diagnostics.load(folder.rows, range(9))


def weights(folder: RunFolder) -> dict[str, Any]:
    state = checkpoint.load(folder.state)
    assert state is not None
    return state


def test_a_run_tracks_what_its_experts_do() -> None:
    folder = run()
    found = logged(folder)
    layers = ("layers.0", "layers.1")
    for row in range(3):
        for name in (*diagnostics.ROUTER, *diagnostics.EXPERTS):
            if (row, name) == (0, "router/task_information_normalised"):
                continue  # one task so far
            section, _, rest = name.partition("/")
            own = [found[row, f"{section}/{layer}/{rest}"] for layer in layers]
            whole = sum(own) if diagnostics.ROUTER.get(name, ("",))[0] in diagnostics.SUMMED else sum(own) / 2
            assert found[row, name] == pytest.approx(whole), name
        for who in diagnostics.WHO:
            assert 0 <= found[row, f"calibration/{who}_accuracy"] <= 1
            assert 0 <= found[row, f"calibration/{who}_ece"] <= 1
            assert 0 <= found[row, f"calibration/{who}_brier"] <= 2
            assert found[row, f"calibration/{who}_nll"] >= 0
        assert found[row, "router/dropped_share"] > 0  # a capacity of 1 has no room to spare
        assert 0 <= found[row, "router/entropy"] <= math.log(3 + row)
        assert found[row, "time/diagnostics_seconds"] > 0
    # the router drift of both roads is one figure
    last = documents(folder)[-1]
    known = [d for d in last["drift"] if d is not None]
    assert found[2, "router/drift"] == pytest.approx(sum(known) / len(known))
    metrics = folder.facts()["metrics"]
    for name in (*diagnostics.ROUTER, *diagnostics.EXPERTS, "calibration/gate_pool_ece"):
        assert metrics[name] == found[2, name]
    pictures = {Path(p).name for p in folder.facts()["pictures"]}
    assert {"router_load.png", "expert_similarity.png", "drop_one_expert.png", "expert_calibration.png"} <= pictures
    table = list(csv.DictReader((folder.figures / "diagnostics.csv").read_text().splitlines()))
    assert {row["after"] for row in table} == {"0", "1", "2"}
    assert {row["layer"] for row in table} == {"", *layers}
    assert {row["expert"] for row in table if row["name"] == "without_accuracy" and row["after"] == "2"} == set("01234")
    assert json.loads((folder.figures / "diagnostics.json").read_text()) == {"rows": documents(folder)}


def test_the_model_answers_as_its_row_says() -> None:
    """With all samples asked, the document's accuracy is the matrix's."""
    folder = run({"evaluation": {"diagnostics_samples": 9999}, "model": {"moe": {"router": {"capacity": 0.0}}}})
    found = logged(folder)
    for d in documents(folder):
        assert d["view"] == "class_il"
        cells = [found[d["row"], f"class_il/cells/exp_{j:02d}"] for j in d["experiences"]]
        assert d["model"]["accuracies"] == pytest.approx(cells)
        assert d["model"]["ece"] == pytest.approx(found[d["row"], "class_il/ece"], abs=1e-6)
        loads = [layer["load"] for layer in d["layers"].values()]
        assert all(sum(row) == 2 * n for load in loads for row, n in zip(load, d["samples"], strict=True))


@pytest.mark.parametrize("router", ["topk", "random"])  # one of them draws random numbers whenever it is asked
def test_no_weight_depends_on_it(router: str) -> None:
    spec = {"name": router} if router == "random" else BASE["model"]["moe"]["router"]
    states = [
        weights(run({"model": {"moe": {"router": spec}}, "evaluation": {"diagnostics": level}}))
        for level in ("none", "routing", "all")
    ]
    for other in states[1:]:
        assert states[0]["structure"] == other["structure"]  # usage counters are in it
        assert all(torch.equal(w, other["model"][n]) for n, w in states[0]["model"].items())
        assert torch.equal(states[0]["generators"]["torch"], other["generators"]["torch"])
        assert states[0]["generators"]["python"] == other["generators"]["python"]
        assert states[0]["loads"] == other["loads"]


@pytest.mark.parametrize("chunks", [2, 9])
def test_a_stopped_run_measures_the_same(chunks: int, tmp_path: Path) -> None:
    whole = run({"tracking": {"root": str(tmp_path / "whole")}})
    plan, catalogue = api.plan_of(merged(BASE), [])
    folder = api.new_run(plan)
    left = iter(range(chunks))
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, api.data_folder(), stop=lambda: next(left, None) is None)
    assert api.resume(folder)["status"] == "FINISHED"
    assert documents(folder) == documents(whole)
    exact = [{k: v for k, v in logged(f).items() if not k[1].startswith("time/")} for f in (folder, whole)]
    assert exact[0] == exact[1]
    for name in ("diagnostics.csv", "diagnostics.json", "drop_one_expert.png"):
        assert (folder.figures / name).read_bytes() == (whole.figures / name).read_bytes()


def test_how_much_is_measured() -> None:
    routing, none = run({"evaluation": {"diagnostics": "routing"}}), run({"evaluation": {"diagnostics": "none"}})
    names = {name for _, name in logged(routing)}
    assert set(diagnostics.ROUTER) <= names
    assert not [n for n in names if n.startswith("calibration/") or n in diagnostics.EXPERTS]
    assert not (routing.figures / "expert_similarity.png").exists()
    assert documents(none) == []
    assert "router/load_cv" not in {name for _, name in logged(none)}
    assert "router/drift" in {name for _, name in logged(none)}  # as ever
    with pytest.raises(UserError, match=r"evaluation\.diagnostics: expected"):
        run({"evaluation": {"diagnostics": "everything"}})


def test_an_expert_for_each_task_is_worth_its_task() -> None:
    folder = run(
        {"stream": {"scenario": "task"}, "strategy": ["expand"], "trainer": {"epochs": 15},
         "model": {"hidden": [16], "moe": {"experts": 1, "router": "task_table"}}}
    )  # fmt: skip
    last = documents(folder)[-1]
    assert last["view"] == "task_il"
    (layer,) = last["layers"].values()
    assert layer["task_information"] == pytest.approx(math.log(3))
    assert layer["task_information_normalised"] == pytest.approx(1.0)
    assert layer["purity_of_experts"] == [1.0, 1.0, 1.0]
    assert layer["dropped_share"] is None
    own = last["model"]["accuracies"]
    for expert, answers in enumerate(layer["without"]):
        lost = [a - b for a, b in zip(own, answers["accuracies"], strict=True)]
        assert lost[expert] > 0.2
        assert [x for j, x in enumerate(lost) if j != expert] == [0.0, 0.0]
    for pool in layer["pools"].values():  # one expert a task: nothing to join
        assert pool["accuracies"] == own


@pytest.mark.parametrize("world", WORLDS)
def test_every_backbone_can_be_asked(world: str) -> None:
    moe = {"experts": 2, "router": {"name": "topk", "k": 1, "order": "after"}}
    folder = api.run(
        merged({**BASE, "strategy": "naive"}, {"stream": None, "model": None}, WORLDS[world], {"model": {"moe": moe}},
               {"trainer": {"max_steps": 2, "epochs": 1}},
               {"stream": {"scenario": "domain"}} if world == "byte_lm" else {}),
        plugins=PLUGINS,
    )  # fmt: skip
    last = documents(folder)[-1]
    assert len(last["layers"]) == 2
    for layer in last["layers"].values():
        assert len(layer["alone"]) == len(layer["without"]) == 2
        assert ("gate" in layer["pools"]) == (world != "text_encoder")
        assert ("gate_pool" in layer["reasons"]) == (world == "text_encoder")
        assert all(0 <= a["accuracy"] <= 1 for a in layer["alone"])
        assert layer["unserved_share"] == 0
    assert last["view"] == ("next_byte" if world == "byte_lm" else "class_il")
    values = folder.facts()["metrics"]
    assert values["calibration/model_nll"] > 0
    assert (values["calibration/gate_pool_nll"] is None) == (world == "text_encoder")
    if world == "text_encoder":
        assert "which tokens belong to a sample" in folder.facts()["reasons"]["calibration/gate_pool_nll"]


def test_without_experts_there_is_nothing_to_measure() -> None:
    folder = run({"model": {"moe": None}, "strategy": ["naive"]})
    assert documents(folder) == []
    assert not {n.partition("/")[0] for _, n in logged(folder)} & {"router", "experts", "calibration"}


def test_a_strategy_that_predicts_by_itself_is_not_its_experts() -> None:
    folder = run({"stream": {"scenario": "task"}, "strategy": ["separate"]})
    reasons = folder.facts()["reasons"]
    assert reasons["calibration/model_ece"] == "strategy Separate has its own way to predict"
    assert folder.facts()["metrics"]["experts/cka"] is None


def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = run({"stream": {"limit": 2}, "trainer": {"max_steps": 2}})
    for name in ("router_load", "expert_similarity", "drop_one_expert", "expert_calibration"):
        assert (folder.figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
