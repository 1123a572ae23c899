"""Native Avalanche strategies on our streams and models, tracked like our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe.errors import UserError
from cmoe.strategies import Avalanche

from .helpers import BY_TASK, WORLDS, run, same, weights

NATIVE: dict[str, dict[str, Any]] = {
    "Naive": {},
    "Cumulative": {},
    "Replay": {"mem_size": 60},
    "EWC": {"ewc_lambda": 1.0},
    "SynapticIntelligence": {"si_lambda": 0.1},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "GDumb": {"mem_size": 200},
}


def spec(name: str, **options: Any) -> dict[str, Any]:
    return {"strategy": {"name": "avalanche", "strategy": name, "options": {**NATIVE.get(name, {}), **options}}}


@pytest.mark.parametrize("name", NATIVE)
def test_any_runs_by_name_and_gives_rows_like_any_other(tmp_path: Path, name: str) -> None:
    of = run(tmp_path, spec(name), {"trainer": {"epochs": 2}})
    assert list(of.record.rows) == [-1, 0, 1, 2, 3, 4]
    assert all(sorted(row.columns) == [0, 1, 2, 3, 4] for row in of.record.rows.values())
    facts = of.folder.facts()
    assert facts["status"] == "FINISHED"
    metrics = facts["metrics"]
    if name == "Naive":
        assert metrics.keys() == run(tmp_path, {"strategy": "naive"}).folder.facts()["metrics"].keys()
    assert metrics["class_il/learning_accuracy"] > 0.3
    if name in ("Replay", "Cumulative"):
        assert metrics["class_il/acc_macro"] > 0.3
    (strategy,) = of.strategies
    assert isinstance(strategy, Avalanche)
    trained = dict(strategy.native.model.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in of.model.named_parameters()), "what was trained is evaluated"


def test_joint_training_on_the_joint_scenario(tmp_path: Path) -> None:
    changes = {"stream": {"scenario": "joint"}, "model": {"head": "shared"}, "trainer": {"epochs": 3}}
    of = run(tmp_path, spec("JointTraining"), changes)
    assert [row for row in of.record.rows if row >= 0] == [4]
    assert of.folder.facts()["metrics"]["class_il/acc_macro"] > 0.5


@pytest.mark.parametrize("name", ["Naive", "Replay"])
def test_a_native_run_is_deterministic(tmp_path: Path, name: str) -> None:
    of, again, other = (run(tmp_path, spec(name), {"seed": seed, "stream": {"limit": 3}}) for seed in (0, 0, 1))
    assert same(weights(of), weights(again))
    assert not same(weights(of), weights(other))


@pytest.mark.parametrize("reset", ["experience", "never"])
def test_the_optimizers_state_is_kept_as_configured(tmp_path: Path, reset: str) -> None:
    """With a huge momentum the first step of an experience shows whether the last one's is still there."""
    small = {"stream": {"limit": 2}, "trainer": {"epochs": 1}}
    optimizer = {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.99, "reset": reset}}
    of = run(tmp_path, spec("Naive"), small, optimizer)
    other = "never" if reset == "experience" else "experience"
    apart = run(tmp_path, spec("Naive"), small, {"optimizer": {**optimizer["optimizer"], "reset": other}})
    assert not same(weights(of), weights(apart))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (spec("Naiv"), {}, "did you mean 'Naive'?"),
    (spec("SynapticIntelligenc"), {}, "did you mean 'SynapticIntelligence'?"),
    (spec("Replay", mem_siz=3), {}, "mem_siz"),
    (spec("Naive"), {"model": {"head": "growing"}}, "expected model.head 'shared'"),
    (spec("Naive"), {"stream": {"scenario": "task"}}, "expected model.head 'shared'"),
    (
        spec("Naive"),
        {"stream": {"scenario": "task"}, "model": {"head": "shared", "moe": BY_TASK}},
        "router that needs no task label",
    ),
    (spec("Naive"), {"stream": {"scenario": "online"}}, "'online'"),
    (spec("Naive"), {**WORLDS["byte_lm"], "model": {"name": "byte_lm", "head": "shared"}}, "language modelling"),
    (spec("JointTraining"), {}, "JointTraining needs stream.scenario 'joint'"),
    ({"strategy": ["naive", spec("Naive")["strategy"]]}, {}, "alone"),
]


@pytest.mark.parametrize(("native", "changes", "says"), REFUSED)
def test_what_avalanche_cannot_be_given_is_refused(
    tmp_path: Path, native: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    scenario = {"stream": {"scenario": "domain"}} if "byte_lm" in str(changes) else {}
    with pytest.raises(UserError) as refused:
        run(tmp_path, native, changes, scenario)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["GEM", "ICaRL"])
def test_arguments_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"avalanche\.options: {name} refuses them \(.*missing"):
        run(tmp_path, spec(name))
