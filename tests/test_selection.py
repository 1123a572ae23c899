"""Choosing settings: what a grid combines to, the same budget for all, the best on the validation split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmoe.cli.main import main
from cmoe.config.where import ConfigError
from cmoe.errors import UserError
from cmoe.metrics.catalogue import lower_is_better, metric_names
from cmoe.plugins import Catalogue
from cmoe.selection import choose, confirmed, equal_budget, fresh_seeds, settings, wanted
from cmoe.sweep import PRELOAD

STUDY: dict[str, Any] = {
    "experiment": "e",
    "stream": {"name": "split_digits", "limit": 2},
    "trainer": {"max_steps": 3},
    "grid": {"optimizer.lr": [0.001, 0.01]},
    "variants": {
        "naive": {"strategy": "naive", "grid": {"optimizer.lr": [0.002, 0.02]}},
        "replay": {"strategy": {"name": "replay", "size": 20}},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "tracking": {"enabled": False, "root": str(folder / "runs")}, **changes}))
    return path


def test_a_variant_has_its_own_values_and_else_the_file_s(file: Path) -> None:
    found = settings(str(file), ["seed=0..2"], Catalogue())
    assert [(s.method, s.values) for s in found] == [
        ("naive", ("optimizer.lr=0.002",)),
        ("naive", ("optimizer.lr=0.02",)),
        ("replay", ("optimizer.lr=0.001",)),
        ("replay", ("optimizer.lr=0.01",)),
    ]
    for setting in found:
        assert [p.seed for p in setting.plans] == [0, 1, 2]
        assert {f"optimizer.lr={p.optimizer['lr']}" for p in setting.plans} == set(setting.values)
    assert equal_budget(found) == 2
    assert fresh_seeds(found) == [3, 4, 5]


def test_what_is_typed_is_none_of_the_file_s_grid(file: Path) -> None:
    found = settings(str(file), ["optimizer.lr=0.1,0.2,0.3", "seed=4"], Catalogue(), ["replay"])
    assert [s.values for s in found] == [("optimizer.lr=0.1",), ("optimizer.lr=0.2",), ("optimizer.lr=0.3",)]
    found = settings(str(file), ["strategy=naive,lwf"], Catalogue())
    assert [(s.method, s.values) for s in found] == [
        (m, (f"optimizer.lr={lr}",)) for m in ("naive", "lwf") for lr in (0.001, 0.01)
    ]


def test_the_best_mean_is_chosen_and_made_again_with_other_seeds(file: Path) -> None:
    found = settings(str(file), ["seed=0,1"], Catalogue(), more=["evaluation.split=validation"])
    assert {p.evaluation["split"] for s in found for p in s.plans} == {"validation"}
    scores = {("naive", 0.002): (0.9, 0.1), ("naive", 0.02): (0.4, 0.5), ("replay", 0.001): (0.2, 0.4), ("replay", 0.01): (0.1, 0.7)}  # fmt: skip

    def value(plan: Any) -> float:
        return scores[plan.label, plan.optimizer["lr"]][plan.seed]

    best = choose(found, "class_il/acc_macro", value)
    assert [(c.setting.values, round(c.mean, 3), c.tried) for c in best] == [
        (("optimizer.lr=0.002",), 0.5, 2),
        (("optimizer.lr=0.01",), 0.4, 2),
    ]
    worst = choose(found, "class_il/forgetting_chaudhry", value)
    assert [c.setting.values for c in worst] == [("optimizer.lr=0.02",), ("optimizer.lr=0.001",)]
    plans = confirmed(str(file), best, [5, 6], Catalogue())
    assert [(p.label, p.optimizer["lr"], p.seed, p.evaluation["split"]) for p in plans] == [
        (m, lr, s, "test") for m, lr in (("naive", 0.002), ("replay", 0.01)) for s in (5, 6)
    ]
    with pytest.raises(UserError, match=r"expected a value of class_il/acc_macro for every run, got none for 'naive"):
        choose(found, "class_il/acc_macro", lambda plan: None)


def test_budgets_differ_or_leave_no_choice(tmp_path: Path) -> None:
    path = written(tmp_path, grid={"optimizer.lr": [0.1, 0.2, 0.3]})
    with pytest.raises(UserError, match=r"as many settings for every method, got 'naive' 2, 'replay' 3"):
        equal_budget(settings(str(path), [], Catalogue()))
    with pytest.raises(UserError, match="at least two settings"):
        equal_budget(settings(str(path), ["optimizer.lr=0.1"], Catalogue()))


@pytest.mark.parametrize("value", [3, [1, 2], {"optimizer.lr": 0.1}, {"optimizer.lr": []}])
def test_a_malformed_grid_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"grid: expected a mapping from keys like optimizer\.lr to lists"):
        settings(str(written(tmp_path, grid=value)), [], Catalogue())
    with pytest.raises(ConfigError, match="optimiser"):
        settings(str(written(tmp_path, grid={"optimiser.lr": [1, 2]}, variants=None)), [], Catalogue())


def test_only_the_validation_split_chooses() -> None:
    assert wanted("val:class_il/acc_macro") == "class_il/acc_macro"
    for text in ("test:class_il/acc_macro", "class_il/acc_macro", "val:"):
        with pytest.raises(UserError, match="expected val:METRIC"):
            wanted(text)
    with pytest.raises(UserError, match=r"got 'class_il/acc_makro' \(did you mean 'class_il/acc_macro'\?\)"):
        wanted("val:class_il/acc_makro")


def test_what_is_better_when_lower() -> None:
    lower = {name for name in metric_names() if lower_is_better(name)}
    assert {"class_il/forgetting_chaudhry", "task_il/ece", "bits_per_byte/bpb_macro", "class_il/intransigence"} <= lower
    assert not {"class_il/acc_macro", "bits_per_byte/bwt_gem", "task_il/bwt_plus", "class_il/rem"} & lower


@pytest.fixture
def light() -> Iterator[None]:
    """A fork server that imports no more than the runs here need."""
    import cmoe.sweep

    setattr(cmoe.sweep, "PRELOAD", ("cmoe.session", "cmoe.runner", "sklearn.datasets"))  # noqa: B010
    yield
    setattr(cmoe.sweep, "PRELOAD", PRELOAD)  # noqa: B010


def test_the_command_chooses_then_reads_the_test_set(
    tmp_path: Path, light: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, variants={"replay": STUDY["variants"]["replay"]})
    arguments = ["sweep", str(path), "seed=3", "--select", "val:class_il/acc_macro", "--confirm", "1", "--jobs", "2", "--json"]  # fmt: skip
    assert main(arguments) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    tried = {r["name"]: r["metrics"]["class_il/acc_macro"] for r in document["selection"]}
    assert set(tried) == {"replay optimizer.lr=0.001 s3", "replay optimizer.lr=0.01 s3"}
    (chosen,) = document["chosen"]
    assert chosen["mean"] == max(tried.values())
    assert tried[f"replay {chosen['setting'][0]} s3"] == chosen["mean"]
    (final,) = document["runs"]
    assert final["name"] == "replay s4"
    assert final["status"] == "finished"
    assert main([*arguments[:3], "--confirm", "1"]) == 2
