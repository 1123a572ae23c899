"""Studies: variants, seeds, published figures, and grids over keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.config.study import grid, label_grid, read_study, split
from cmoe.config.where import ConfigError

BASE = {"experiment": "e", "stream": "split_digits", "trainer": {"epochs": 2}}
VARIANTS = {**BASE, "variants": {"a": {"strategy": "naive"}, "b": {"strategy": {"name": "replay", "size": 7}}}}


def test_a_plain_configuration_is_one_plan() -> None:
    study = read_study(BASE)
    assert [p.label for p in study.plans] == ["naive"]
    assert study.seeds == [0]
    assert study.published == {}


def test_every_variant_is_a_plan_with_its_label_and_the_rest_of_the_base() -> None:
    plans = read_study(VARIANTS, ["seed=3"]).plans
    assert [p.label for p in plans] == ["a", "b"]
    assert plans[1].strategy[0]["size"] == 7
    assert {p.seed for p in plans} == {3}
    assert {p.trainer["epochs"] for p in plans} == {2}
    assert len({p.hash for p in plans}) == 2


def test_only_picks_variants_and_names_the_nearest() -> None:
    assert [p.label for p in read_study(VARIANTS, only=["b"]).plans] == ["b"]
    many = {**BASE, "variants": {"replay": {"strategy": "replay"}, "naive": {"strategy": "naive"}}}
    with pytest.raises(ConfigError, match=r"--only: expected a variant .*got 'replya' \(did you mean 'replay'\?\)"):
        read_study(many, only=["replya"])


def test_a_strategy_on_the_command_line_replaces_the_variants() -> None:
    plans = read_study(VARIANTS, ["strategy=lwf"]).plans
    assert [p.strategies for p in plans] == ["lwf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": []}, "variants"),
        ({"variants": {}}, "variants"),
        ({"variants": {"a": 3}}, r"variants\.a"),
        ({"variants": {"a": {"strateggy": "naive"}}}, "strateggy.*did you mean 'strategy'"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, -1]}, "seeds"),
        ({"seeds": "many"}, "seeds"),
        ({"published": 3}, "published"),
        ({"published": {"rows": 3}}, "published"),
    ],
)
def test_what_is_wrong_in_a_study_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_study({**BASE, **change})


def test_seeds_are_a_number_or_a_list() -> None:
    assert read_study({**BASE, "seeds": 3}).seeds == [0, 1, 2]
    assert read_study({**BASE, "seeds": [5, 7]}).seeds == [5, 7]


def test_a_grid_combines_values_and_ranges() -> None:
    assert grid(["a=1,2", "seed=0..2"]) == [[f"a={a}", f"seed={s}"] for a in (1, 2) for s in (0, 1, 2)]
    assert grid([]) == [[]]
    assert grid(["strategy=[expand,replay],naive"]) == [["strategy=[expand,replay]"], ["strategy=naive"]]
    with pytest.raises(ConfigError, match=r"seed: expected a range"):
        grid(["seed=4..1"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a,b", ["a", "b"]), ("[a,b]", ["[a,b]"]), ("{n: x, k: 1},y", ["{n: x, k: 1}", "y"]), ('"a,b",c', ['"a,b"', "c"])],
)
def test_commas_inside_brackets_and_quotes_do_not_split(text: str, parts: list[str]) -> None:
    assert split(text) == parts


def test_labels_say_what_varies_but_seed_and_strategy() -> None:
    overrides = ["strategy=naive,lwf", "optimizer.lr=0.1,0.2", "seed=0..1", "trainer.epochs=3"]
    combination = grid(overrides)[0]
    assert label_grid(overrides, combination) == "optimizer.lr=0.1"


def test_every_published_row_is_a_variant(tmp_path: Path) -> None:
    from cmoe.plugins import builtin_folder

    for path in sorted((builtin_folder("configs") / "reproduce").glob("*.yaml")):
        study = read_study(path)
        assert set(study.published["rows"]) <= {p.label for p in study.plans}, path
