"""Everything that can be wrong with a configuration is one line with file, key and expectation."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.config import load
from cmoe.config.where import ConfigError
from cmoe.errors import UserError
from cmoe.plugins import Catalogue

TOY = "stream: {name: toy}\n"

# text of the file -> what the line must hold: the key, and words of what was expected
CASES: dict[str, tuple[str, list[str]]] = {
    # the file as such
    "empty": ("", ["empty"]),
    "only a comment": ("# nothing\n", ["empty"]),
    "a list": ("- a\n- b\n", ["mapping", "list of 2"]),
    "a scalar": ("just words\n", ["mapping", "just words"]),
    "duplicate key": ("stream: toy\nseed: 1\nseed: 2\n", ["line 3", "'seed' stands twice", "line 2"]),
    "nested duplicate key": ("stream:\n  name: toy\n  name: toy\n", ["line 3", "'name' stands twice"]),
    "tab": ("stream:\n\tname: toy\n", ["line 2", "tab"]),
    "unclosed": ("stream: {name: toy\n", ["line"]),
    "two documents": ("stream: toy\n---\nstream: toy\n", ["line 2"]),
    "python tag": ("stream: !!python/object:os.system {}\n", ["line 1", "tag"]),
    "a set": ("stream: !!set {toy}\n", ["stream", "set"]),
    "recursive alias": ("stream: &a {name: toy, anything: *a}\n", ["without end"]),
    "alias bomb": ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefg", "bcdefgh", strict=True)), ["without end"]),
    "deep nesting": ("stream: " + "[" * 3000 + "]" * 3000, ["deep"]),
    "undefined alias": ("stream: *nowhere\n", ["line 1", "alias"]),
    "huge integer": (f"seed: {'9' * 5000}\n", ["YAML"]),
    "control character": ("stream: toy\x01\n", ["YAML"]),
    "number as key": ("stream: toy\n1: 2\n", ["1: expected"]),
    "null key": ("stream: toy\n~: 2\n", ["keys that are text"]),
    # sections and keys
    "unknown section": (TOY + "trainr: {epochs: 1}\n", ["trainr: expected", "did you mean 'trainer'"]),
    "key at the wrong level": (TOY + "batch_size: 3\n", ["batch_size: expected", "'trainer.batch_size'"]),
    "unknown key": (TOY + "trainer: {epoch: 1}\n", ["trainer.epoch: expected", "did you mean 'epochs'"]),
    "key of another section": (TOY + "model: {epochs: 1}\n", ["model.epochs: expected", "'trainer.epochs'"]),
    "section is a list": (TOY + "trainer: [1]\n", ["trainer: expected a mapping", "list of 1"]),
    "section is a word": (TOY + "tracking: off\n", ["tracking: expected a mapping", "false"]),
    "unknown option of a component": ("stream: {name: toy, sise: 3}\n", ["stream.sise: expected", "did you mean 'size'"]),
    "unknown option of a built-in": (TOY + "optimizer: {name: sgd, momentun: 0.5}\n", ["optimizer.momentun", "'momentum'"]),
    "component without options": (TOY + "scheduler: {name: constant, x: 1}\n", ["scheduler.x", "no options"]),
    "no stream": ("seed: 1\n", ["stream.name: expected the name of a task"]),
    "null stream": ("stream: null\n", ["stream", "name of a task"]),
    "stream without name": ("stream: {size: 3}\n", ["stream.name: expected the name of a task"]),
    "stream is a list": ("stream: [toy]\n", ["stream: expected a task", "list of 1"]),
    "stream name is a number": ("stream: {name: 3}\n", ["stream.name: expected", "3"]),
    "unknown task": ("stream: toi\n", ["stream: expected a task", "did you mean 'toy'"]),
    "unknown task in a mapping": ("stream: {name: toi, size: 2}\n", ["stream.name: expected a task", "did you mean 'toy'"]),
    "broken task": ("stream: broken\n", ["stream: expected a task", "broken.py", "line 1"]),
    "unknown backbone": (TOY + "model: mpl\n", ["model", "backbone", "did you mean 'mlp'"]),
    "unknown strategy": (TOY + "strategy: repaly\n", ["strategy.0", "strategy", "did you mean 'replay'"]),
    "unknown second strategy": (TOY + "strategy: [naive, {name: ewk}]\n", ["strategy.1", "expected a strategy"]),
    "unknown optimizer": (TOY + "optimizer: adma\n", ["optimizer", "an optimizer", "'adam'"]),
    "unknown router": (TOY + "model: {moe: {router: topc}}\n", ["model.moe.router", "expected a router", "'topk'"]),
    "unknown expert": (TOY + "model: {moe: {expert: {name: fnn}}}\n", ["model.moe.expert", "expert", "'ffn'"]),
    "a name of another kind": (TOY + "model: {moe: {router: replay}}\n", ["model.moe.router", "'replay'"]),
    "unknown router option": (TOY + "model: {moe: {router: {name: topk, kk: 2}}}\n", ["model.moe.router.kk: expected"]),
    "router range": (TOY + "model: {moe: {router: {name: topk, k: 0}}}\n", ["model.moe.router.k: expected an integer >= 1"]),
    "strategy is null": (TOY + "strategy: null\n", ["strategy: expected a strategy"]),
    "strategy is empty": (TOY + "strategy: []\n", ["strategy: expected a strategy"]),
    "strategy holds a number": (TOY + "strategy: [3]\n", ["strategy.0: expected a strategy", "3"]),
    "required option": ("stream: demanding\n", ["stream.path: expected text", "required", "nothing"]),
    # types and ranges
    "word for integer": (TOY + "trainer: {epochs: ten}\n", ["trainer.epochs: expected an integer >= 1", "'ten'"]),
    "fraction for integer": (TOY + "trainer: {epochs: 1.5}\n", ["trainer.epochs: expected an integer", "1.5"]),
    "flag for integer": (TOY + "trainer: {epochs: true}\n", ["trainer.epochs: expected an integer", "true"]),
    "zero": (TOY + "trainer: {batch_size: 0}\n", ["trainer.batch_size: expected an integer >= 1", "got 0"]),
    "negative seed": (TOY + "seed: -1\n", ["seed: expected an integer >= 0", "-1"]),
    "null for integer": (TOY + "seed: null\n", ["seed: expected an integer", "null"]),
    "flag for number": (TOY + "optimizer: {name: sgd, lr: true}\n", ["optimizer.lr: expected a number > 0", "true"]),
    "word for number": (TOY + "optimizer: {name: sgd, lr: big}\n", ["optimizer.lr: expected a number > 0", "'big'"]),
    "not a number": (TOY + "optimizer: {name: sgd, lr: .nan}\n", ["optimizer.lr: expected a number > 0"]),
    "out of range": (TOY + "optimizer: {name: sgd, momentum: 1.0}\n", ["optimizer.momentum: expected", ">= 0 and < 1"]),
    "probability": ("stream: {name: toy, ratio: 1.01}\n", ["stream.ratio: expected a number >= 0 and <= 1", "1.01"]),
    "beyond any float": (f"stream: {{name: toy, rate: {'9' * 400}}}\n", ["stream.rate: expected a number"]),
    "number for text": (TOY + "experiment: 2024\n", ["experiment: expected text", "2024", "quotes"]),
    "flag for text": (TOY + "experiment: yes\n", ["experiment: expected text", "true", "quotes"]),
    "word for flag": ("stream: {name: toy, flag: maybe}\n", ["stream.flag: expected true or false", "'maybe'"]),
    "number for flag": ("stream: {name: toy, flag: 1}\n", ["stream.flag: expected true or false", "got 1"]),
    "choice": ("stream: {name: toy, mode: steddy}\n", ["stream.mode: expected 'slow', 'fast' or 'steady'", "'steady'?"]),
    "choice of a section": (TOY + "model: {head: sharred}\n", ["model.head: expected", "did you mean 'shared'"]),
    "scenario": ("stream: {name: toy, scenario: clas}\n", ["stream.scenario: expected", "did you mean 'class'"]),
    "scalar for list": ("stream: {name: toy, items: 3}\n", ["stream.items: expected a list of integers", "got 3"]),
    "item of a list": ("stream: {name: toy, items: [1, two]}\n", ["stream.items.1: expected an integer", "'two'"]),
    "item of a tuple": ("stream: {name: toy, sizes: [1, 2.5]}\n", ["stream.sizes.1: expected an integer", "2.5"]),
    "tuple too short": ("stream: {name: toy, pair: [1]}\n", ["stream.pair: expected a list of 2", "list of 1"]),
    "list for mapping": ("stream: {name: toy, table: [1]}\n", ["stream.table: expected a mapping"]),
    "value of a mapping": ("stream: {name: toy, table: {a: b}}\n", ["stream.table.a: expected a number", "'b'"]),
    "union, word": ("stream: {name: toy, mixed: atuo}\n", ["stream.mixed: expected 'auto' or a list", "did you mean 'auto'"]),
    "union, item": ("stream: {name: toy, mixed: [0]}\n", ["stream.mixed.0: expected an integer >= 1"]),
    "nested component": ("stream: {name: toy, router: {name: topk, k: x}}\n", ["stream.router.k: expected an integer"]),
    "moe is a word": (TOY + "model: {moe: yes please}\n", ["model.moe: expected a mapping", "yes please"]),
    "moe unknown key": (TOY + "model: {moe: {expert_count: 3}}\n", ["model.moe.expert_count: expected"]),
    "layers": (TOY + "model: {moe: {layers: [a]}}\n", ["model.moe.layers.0: expected an integer"]),
    # extends and interpolation
    "extends nothing": ("extends: missing.yaml\n" + TOY, ["extends", "missing.yaml", "no such file"]),
    "extends a number": ("extends: 3\n" + TOY, ["extends: expected a file", "3"]),
    "extends itself": ("extends: config.yaml\n" + TOY, ["extends: expected no circle", "config.yaml -> "]),
    "unknown interpolation": (TOY + "experiment: ${nope}\n", ["experiment: expected an interpolation", "nope"]),
    "malformed interpolation": (TOY + "experiment: ${\n", ["experiment: expected an interpolation"]),
    "circular interpolation": (TOY + "experiment: ${label}\nlabel: ${experiment}\n", ["expected an interpolation"]),
    "unset variable": (TOY + "experiment: ${oc.env:CMOE_NOT_SET_ANYWHERE}\n", ["experiment: expected an interpolation"]),
    "missing value": (TOY + "experiment: ???\n", ["experiment: expected a value"]),
    "plugins is a word": (TOY + "plugins: here\n", ["plugins: expected a list"]),
    "plugins folder": (TOY + "plugins: [nowhere]\n", ["plugins.0: expected a folder", "nowhere"]),
    # combinations
    "a scenario that the task lacks": ("stream: {name: toy, scenario: domain}\n", ["stream.scenario: expected", "'toy'"]),
    "backbone of another modality": (TOY + "model: byte_lm\n", ["model.name: expected a backbone that takes image", "bytes"]),
    "image backbone for bytes": ("stream: needy\nmodel: vit\n", ["model.name: expected a backbone that takes bytes"]),
    "two owners of data": (TOY + "strategy: [owner, rival]\n", ["strategy.1: expected one", "'owner' and 'rival'"]),
    "two that predict": (TOY + "strategy: [seer, naive, oracle]\n", ["strategy.2", "'seer' and 'oracle'"]),
    "own loop beside another": (TOY + "strategy: [naive, hermit]\n", ["strategy.1: expected 'hermit' alone"]),
    "avalanche beside another": (TOY + "strategy: [avalanche, replay]\n", ["strategy.0: expected 'avalanche' alone"]),
    "a strategy twice": (TOY + "strategy: [replay, {name: replay, size: 3}]\n", ["each strategy once", "'replay'"]),
    "strategy needs the label": (TOY + "strategy: labelled\n", ["strategy.0", "task label", "'labelled'"]),
    "router needs the label": (TOY + "model: {moe: {router: task_table}}\n", ["model.moe.router", "task label"]),
    "expand a dense model": (TOY + "strategy: expand\n", ["model.moe: expected experts"]),
    "expand isolated, shared head": (
        "stream: {name: toy, scenario: task}\nstrategy: expand\nmodel: {head: shared, moe: {router: task_table}}\n",
        ["model.head: expected 'multi' or 'growing'"],
    ),
    "future router in a decoder": (
        "stream: needy\nmodel: {name: byte_lm, moe: {router: future}}\n", ["model.moe.router: expected a causal router"]),
    "soft router in a decoder": (
        "stream: needy\nmodel: {name: byte_lm, moe: {router: soft}}\n", ["model.moe.router: expected a causal router", "'soft'"]),
    "sequence-level router in a decoder": (
        "stream: needy\nmodel: {name: byte_lm, moe: {router: {name: topk, level: sequence}}}\n",
        ["model.moe.router.level: expected", "'byte_lm'", "got 'sequence'"]),
    "distillation without assignments": (
        TOY + "model: {moe: {router: soft, distillation: 0.1}}\n", ["model.moe.distillation: expected 0", "'soft'"]),
    "dispatch without assignments": (
        TOY + "model: {moe: {router: smear, dispatch: loop}}\n", ["model.moe.dispatch: expected 'auto'", "'smear'"]),
    "merging of different sizes": (
        TOY + "model: {moe: {router: smear, more: [{hidden: 3}]}}\n", ["model.moe.more.0.hidden: expected experts of one kind", "'smear'"]),
    "a router by token id without any": (
        TOY + "model: {moe: {router: {name: stable_moe, distil: token_ids}}}\n", ["model.moe.router", "needs token_ids"]),
    "multi head without label": (TOY + "model: {head: multi}\n", ["model.head: expected", "'multi'"]),
    "task outputs without label": (TOY + "model: {eval_outputs: task}\n", ["model.eval_outputs: expected"]),
    "masked vocabulary": ("stream: needy\nmodel: {name: byte_lm, train_outputs: seen}\n", ["model.train_outputs: expected 'all'"]),
    "online, two passes": ("stream: {name: toy, scenario: online}\ntrainer: {epochs: 2}\n", ["trainer.epochs: expected 1"]),
    "boundaries, online": ("stream: {name: toy, scenario: online}\nstrategy: lwf\n", ["strategy.0: expected a strategy that needs no experience boundaries", "'lwf'"]),
    "two devices": (TOY + "trainer: {devices: 2}\n", ["trainer.devices: expected 1", "not supported yet"]),
    "two clippings": (TOY + "trainer: {clip_norm: 1, clip_value: 1}\n", ["trainer.clip_value: expected 0"]),
    "float64 by grouped_mm": (
        TOY + "model: {moe: {dispatch: grouped}}\ntrainer: {precision: 64-true}\n", ["model.moe.dispatch: expected"]),
    "validation of nothing": (
        "stream: {name: toy, validation: 0}\nevaluation: {split: validation}\n", ["evaluation.split: expected 'test'"]),
}  # fmt: skip


def one_line(error: UserError) -> str:
    line = str(error)
    assert line
    assert "\n" not in line
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_is_one_line(case: str, catalogue: Catalogue, tmp_path: Path) -> None:
    text, parts = CASES[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load.read(path, [], catalogue)
    line = one_line(caught.value)
    assert line.startswith(str(path)), line
    for part in parts:
        assert part in line, line


FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "latin1.yaml": ("stream: t\xf6y\n".encode("latin-1"), ["UTF-8", "0xf6"]),
    "utf16.yaml": ("stream: toy\n".encode("utf-16"), ["UTF-8"]),
    "binary.yaml": (bytes(range(256)), ["UTF-8"]),
    "nul.yaml": (b"stream: toy\0\n", ["YAML"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_text(name: str, catalogue: Catalogue, tmp_path: Path) -> None:
    content, parts = FILES[name]
    (tmp_path / name).write_bytes(content or b"")
    with pytest.raises(ConfigError) as caught:
        load.read(tmp_path / name, [], catalogue)
    assert all(p in one_line(caught.value) for p in [name, *parts])


NAMES = {
    "a missing file": ("confg.yaml", ["confg.yaml", "no such file", "did you mean 'config.yaml'"]),
    "a missing name": ("no_such_name", ["no_such_name", "expected a configuration file"]),
    "a folder": ("plugins", ["expected a configuration file, got a folder"]),
    "a name that no file has": ("x" * 5000, ["expected a configuration"]),
    "a null byte": ("a\0b", ["expected a configuration"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_configuration_that_is_not_there(case: str, catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TOY)
    name, parts = NAMES[case]
    with pytest.raises(ConfigError) as caught:
        load.read(name, [], catalogue)
    line = one_line(caught.value)
    assert all(p in line for p in parts), line


OVERRIDES: dict[str, list[str]] = {
    "epochs": ["expected key=value", "'epochs'"],
    "=3": ["expected key=value"],
    "trainer.=3": ["expected key=value"],
    "trainer epochs=3": ["expected key=value"],
    "trainer.epochs=ten": ["command line: trainer.epochs: expected an integer", "'ten'"],
    "trainer.epochs=": ["command line: trainer.epochs: expected an integer", "null"],
    "trainer.epoch=1": ["command line: trainer.epoch: expected", "'epochs'"],
    "trainr.epochs=1": ["command line: trainr: expected", "'trainer'"],
    "trainer.epochs.x=1": ["command line: trainer.epochs.x: expected a mapping at trainer.epochs"],
    "trainer.epochs=[1": ["command line: trainer.epochs"],
    "trainer.epochs=a: b: c": ["command line: trainer.epochs"],
    "strategy.3.size=1": ["command line: strategy.3: expected an index or name"],
    "strategy.size=1": ["command line: strategy.size: expected an index or name"],
    "strategy.ewc.size=1": ["command line: strategy.ewc: expected an index or name"],
    "strategy.0.sice=1": ["command line: strategy.0.sice: expected", "'size'"],
    "strategy=nothing_like_it": ["command line: strategy.0: expected a strategy"],
    "model.moe.router.k=0": ["command line: model.moe.router.k: expected an integer >= 1"],
    "stream.size=true": ["command line: stream.size: expected an integer >= 1", "true"],
    "extends=x": ["command line: extends", "configuration file"],
    "plugins=[x]": ["command line: plugins", "--plugins"],
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_names_the_command_line(override: str, catalogue: Catalogue) -> None:
    with pytest.raises(ConfigError) as caught:
        load.read({"stream": "toy", "strategy": ["naive", {"name": "replay"}]}, [override], catalogue)
    line = one_line(caught.value)
    for part in OVERRIDES[override]:
        if override == "strategy.0.sice=1":
            part = part.replace("'size'", "no options")  # naive has none
        assert part in line, line


def test_an_inherited_mistake_names_the_file_that_made_it(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("trainer: {epochs: none}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nstream: toy\ntrainer: {batch_size: 4}\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: trainer\.epochs: expected an integer") as caught:
        load.read(tmp_path / "top.yaml", [], catalogue)
    assert "top.yaml" not in str(caught.value)


def test_circle_over_three_files(catalogue: Catalogue, tmp_path: Path) -> None:
    for here, there in ("ab", "bc", "ca"):
        (tmp_path / f"{here}.yaml").write_text(f"extends: {there}.yaml\nstream: toy\n")
    with pytest.raises(ConfigError, match="extends: expected no circle"):
        load.read(tmp_path / "a.yaml", [], catalogue)


def test_a_default_that_its_own_type_refuses_names_the_plugin(catalogue: Catalogue, plugins: Path) -> None:
    (plugins / "odd.py").write_text(
        "from dataclasses import dataclass\nfrom cmoe.streams.task import Task\n\n"
        '@dataclass\nclass Odd(Task):\n    """Odd."""\n    size: int = "many"\n'
    )
    with pytest.raises(ConfigError, match=r"odd\.py: stream\.size: expected an integer, got 'many'"):
        load.read({"stream": "odd"}, [], Catalogue([plugins]))


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(FILES) + len(NAMES) + len(OVERRIDES) >= 60
