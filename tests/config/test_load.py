"""Composition: files over files, the command line over files, interpolation, and who set what."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.config import load
from cmoe.config.plan import Plan
from cmoe.config.text import dump, parse
from cmoe.plugins import Catalogue


def test_defaults_are_filled_in(catalogue: Catalogue) -> None:
    plan = load.read({"stream": "toy"}, [], catalogue)
    assert plan.run == {"experiment": "default", "seed": 0, "label": None}
    assert plan.stream["size"] == 4
    assert plan.stream["sizes"] == [2, 3]
    assert plan.stream["scenario"] == "class"
    assert plan.model["name"] == "mlp"
    assert plan.model["moe"] is None
    assert plan.strategy == [{"name": "naive"}]
    assert plan.optimizer["name"] == "sgd"
    assert plan.optimizer["reset"] == "experience"
    assert plan.scheduler == {"name": "constant"}
    assert plan.trainer["epochs"] == 1


def test_numbers_take_the_type_of_their_option(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stream: {name: toy, rate: 1e-3, ratio: 1, size: 1e3}\noptimizer: {name: sgd, lr: '1e-2'}\n")
    plan = load.read(path, [], catalogue)
    assert plan.stream["rate"] == 1e-3
    assert type(plan.stream["ratio"]) is float
    assert plan.stream["size"] == 1000
    assert type(plan.stream["size"]) is int
    assert plan.optimizer["lr"] == 1e-2


@pytest.mark.parametrize("moe", ["null", "{}"])
def test_empty_moe_is_dense(moe: str, catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"stream: toy\nmodel: {{moe: {moe}}}\n")
    assert load.read(tmp_path / "c.yaml", [], catalogue).model["moe"] is None


def test_nested_components_get_their_defaults(catalogue: Catalogue) -> None:
    plan = load.read({"stream": "toy", "model": {"moe": {"router": {"k": 1}}}}, [], catalogue)
    assert plan.model["moe"]["experts"] == 4
    assert plan.model["moe"]["router"]["name"] == "topk"
    assert plan.model["moe"]["router"]["k"] == 1
    assert "order" in plan.model["moe"]["router"]


def test_extends_merges_in_order_and_the_file_wins(catalogue: Catalogue, tmp_path: Path) -> None:
    sub = tmp_path / "sub"
    sub.mkdir()
    (tmp_path / "a.yaml").write_text("stream: {name: toy, size: 1, word: a}\ntrainer: {epochs: 2, batch_size: 7}\n")
    (sub / "b.yaml").write_text("extends: ../a.yaml\nstream: {size: 2}\n")
    (tmp_path / "c.yml").write_text("trainer: {epochs: 3}\n")
    (tmp_path / "top.yaml").write_text("extends: [sub/b, c.yml]\nstream: {flag: true}\n")
    plan = load.read(tmp_path / "top.yaml", ["trainer.epochs=4"], catalogue)
    assert (plan.stream["size"], plan.stream["word"], plan.stream["flag"]) == (2, "a", True)
    assert (plan.trainer["epochs"], plan.trainer["batch_size"]) == (4, 7)
    named = {k: Path(v).name for k, v in plan.sources.items()}
    assert named["stream.word"] == "a.yaml"
    assert named["stream.size"] == "b.yaml"
    assert named["stream.flag"] == "top.yaml"
    assert named["trainer.epochs"] == "command line"
    assert named["trainer.batch_size"] == "a.yaml"
    assert "trainer.devices" not in named


def test_lists_replace(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("stream: {name: toy, items: [1, 2, 3]}\nstrategy: [naive, replay]\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nstream: {items: [9]}\nstrategy: lwf\n")
    plan = load.read(tmp_path / "b.yaml", [], catalogue)
    assert plan.stream["items"] == [9]
    assert plan.strategies == "lwf"


def test_another_component_drops_the_options_of_the_old_one_but_not_the_section(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(
        "stream: toy\nmodel: {name: mlp, hidden: [5], head: growing, moe: {experts: 3, router: {name: topk, k: 1}}}\n"
        "optimizer: {name: sgd, momentum: 0.5, reset: never}\n"
    )
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nmodel: vit\noptimizer: {name: adam}\n")
    plan = load.read(tmp_path / "b.yaml", ["model.moe.router=future"], catalogue)
    assert plan.model["name"] == "vit"
    assert "hidden" not in plan.model
    assert plan.model["head"] == "growing"
    assert plan.model["moe"]["experts"] == 3
    assert plan.model["moe"]["router"] == {"name": "future", "width": 3}
    assert plan.optimizer["reset"] == "never"
    assert plan.optimizer["lr"] == 1e-3
    assert "momentum" not in plan.optimizer


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("label=12", "label", "12"),
        ("label=null", "label", None),
        ("experiment=2024", "experiment", "2024"),
        ("experiment=true", "experiment", "true"),
        ("stream.rate=1e-4", "stream.rate", 1e-4),
        ("stream.items=[1, 2]", "stream.items", [1, 2]),
        ("stream={size: 9}", "stream.size", 9),
        ("strategy=replay", "strategy.0.name", "replay"),
        ("strategy=[naive, {name: replay, size: 3}]", "strategy.1.size", 3),
        ("strategy.1.size=77", "strategy.1.size", 77),
        ("strategy.replay.size=78", "strategy.1.size", 78),
        ("strategy.0=lwf", "strategy.0.name", "lwf"),
        ("model.moe.experts=2", "model.moe.experts", 2),
        ("model.moe.router.k=1", "model.moe.router.k", 1),
        ("model.moe.router=future", "model.moe.router.width", 3),
        ("optimizer=adamw", "optimizer.lr", 1e-3),
        ("optimizer.lr=0.5", "optimizer.lr", 0.5),
        ("stream.note=a=b", "stream.note", "a=b"),
    ],
)
def test_overrides(override: str, key: str, value: object, catalogue: Catalogue) -> None:
    plan = load.read({"stream": "toy", "strategy": ["naive", {"name": "replay", "size": 5}]}, [override], catalogue)
    here: object = plan.to_dict()
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    assert here == value
    assert type(here) is type(value)


def test_overrides_apply_in_order(catalogue: Catalogue) -> None:
    plan = load.read({"stream": "toy"}, ["strategy=replay", "strategy.0.size=9", "seed=1", "seed=2"], catalogue)
    assert plan.strategy[0]["size"] == 9
    assert plan.seed == 2


def test_interpolation_reads_the_whole_configuration(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "stream: {name: toy, size: '${trainer.batch_size}', note: 'seed ${seed}'}\ntrainer: {batch_size: 6}\n"
    )
    plan = load.read(tmp_path / "c.yaml", ["seed=5", "trainer.epochs=${stream.size}"], catalogue)
    assert plan.stream["size"] == 6
    assert plan.stream["note"] == "seed 5"
    assert plan.trainer["epochs"] == 6
    assert Path(plan.sources["stream.size"]).name == "c.yaml"


def test_plugin_folders_of_a_file_are_relative_to_it_and_only_used_ones_are_kept(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unused").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.yaml").write_text("plugins: [../plugins, ../unused]\nstream: toy\n")
    plan = load.read(elsewhere / "c.yaml", [], Catalogue())
    assert plan.plugins == [str(plugins.resolve())]
    again = Plan.from_dict(plan.to_dict(), Catalogue())
    assert again == plan
    assert load.read({"stream": "split_digits"}, [], Catalogue([plugins])).plugins == []


def test_a_plan_as_a_file_gives_the_same_plan(catalogue: Catalogue, tmp_path: Path) -> None:
    plan = load.read(
        {"stream": {"name": "toy", "word": "1e-3", "note": "\\${a} 010", "table": {"x": 1e-7}}, "strategy": "replay"},
        [],
        catalogue,
    )
    (tmp_path / "config.yaml").write_text(plan.to_yaml())
    again = load.read(tmp_path / "config.yaml", [], catalogue)
    assert again == plan
    assert again.hash == plan.hash
    assert plan.stream["note"] == "${a} 010"


def test_what_is_hashed(catalogue: Catalogue) -> None:
    def of(*overrides: str) -> str:
        return load.read({"stream": "toy"}, overrides, catalogue).hash

    assert len(of()) == 64
    assert of("tracking.enabled=false", "checkpoint.keep=7") == of()
    assert of("trainer.epochs=1") == of()
    for change in ("seed=1", "stream.size=5", "optimizer.lr=0.2", "strategy=lwf", "model.moe.experts=2", "label=x"):
        assert of(change) != of()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), ("1_000", 1000), ("0x1f", 31), ("010", "010"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("yes", True), ("~", None), (".inf", float("inf")), ("e3", "e3"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    assert parse(text, "x") == value
    assert type(parse(text, "x")) is type(value)
    assert parse(dump(value), "x") == value


def test_names_of_configurations_that_come_with_cmoe() -> None:
    for name, path in load.builtin_configs():
        assert load.find(name) == path
