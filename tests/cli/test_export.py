"""`cmoe export`: the files alone give the run's answers back, bit for bit, and MLflow serves them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmoe import inputs
from cmoe.cli import main
from cmoe.errors import UserError
from cmoe.export import CONFIG, MLFLOW, WEIGHTS, export, load, pack, unpack, write
from cmoe.restored import of_run
from cmoe.rundir import RunFolder

from .finished import make

# every kind of head, router, input and type of weights; the rest is in test_predict
KINDS = [
    "growing",
    "topk",
    "expand",
    "separate",
    "joint",
    "float64",
    "convnet",
    "text",
    "bytes_expand",
    "bytes_separate",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def made(base: Path) -> dict[str, RunFolder]:
    return {}


@pytest.fixture
def run(request: pytest.FixtureRequest, base: Path, made: dict[str, RunFolder]) -> RunFolder:
    name = getattr(request, "param", "expand")
    if name not in made:
        made[name] = make(base, name)
    return made[name]


def samples(restored: Any, count: int = 5) -> torch.Tensor:
    """Made-up raw samples."""
    like = restored.raw_like(count)
    high = restored.stream.vocabulary or 17
    return torch.randint(0, high, like.shape, generator=torch.Generator().manual_seed(3)).to(like.dtype)


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_the_files_alone_give_the_same_bits(run: RunFolder, tmp_path: Path) -> None:
    restored = of_run(run)
    write(restored, tmp_path / "out")
    again = load(tmp_path / "out")
    write(again, tmp_path / "twice")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    for task in range(len(restored.stream.experiences)):
        if restored.stream.language:
            assert again.language(b"some text", task) == restored.language(b"some text", task)
        else:
            raw = samples(restored)
            assert torch.equal(again.logits(raw, task), restored.logits(raw, task))
            assert again.classes(raw, task, 3) == restored.classes(raw, task, 3)
    assert again.why_task() == restored.why_task()
    assert again.class_names == restored.class_names


def test_what_is_written(run: RunFolder, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = run.path.parent.parent
    assert main.main(["export", run.id, "--root", str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = root / "exports" / run.id
    assert Path(document["folder"]) == folder
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {WEIGHTS, CONFIG, f"{MLFLOW}/MLmodel", f"{MLFLOW}/served_model.py"} <= files
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    assert not list(folder.parent.glob(".*"))  # nothing half-written stays
    config = json.loads((folder / CONFIG).read_text())
    assert config["class_names"] == [str(i) for i in range(10)]
    assert config["config"]["strategy"][0]["name"] == "expand"
    assert config["structure"]["moe"]
    assert document["parameters"] == run.facts()["parameters_total"]
    # again: replaced
    assert main.main(["export", str(run.path), "--to", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"models serve -m {folder / MLFLOW} --env-manager local" in out


def test_a_folder_of_somebody_else_stays(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main.main(["export", str(run.path), "--to", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("it holds something else")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("damage", ["config", "weights", "cut", "version"])
def test_a_damaged_export_is_named(run: RunFolder, tmp_path: Path, damage: str) -> None:
    write(of_run(run), tmp_path / "out")
    config, weights = tmp_path / "out" / CONFIG, tmp_path / "out" / WEIGHTS
    if damage == "config":
        config.write_text("{")
    elif damage == "weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "version": 99}))
    with pytest.raises(UserError, match="expected an export of"):
        load(tmp_path / "out")


def test_states_survive_json() -> None:
    state = {
        1: {"a": torch.arange(3), "$odd": (1, [2.5, None, True], {"x", "y"})},
        "plain": {"nested": [torch.zeros(2, 0), {}, ()]},
        (0, 1): float("inf"),
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(state, "s", tensors)))
    again = unpack(packed, tensors)
    assert list(again) == list(state)
    assert torch.equal(again[1]["a"], state[1]["a"])
    assert again[1]["$odd"] == state[1]["$odd"]
    assert again["plain"]["nested"][1:] == [{}, ()]
    with pytest.raises(UserError, match=r"s\.x: expected tensors and plain containers"):
        pack({"x": object()}, "s", {})


def test_a_transform_of_a_plugin_stays_outside(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = of_run(run)
    monkeypatch.setattr(inputs, "transform_spec", lambda transform: None)
    notes = write(restored, tmp_path / "out")
    assert "takes inputs that went through it" in notes[0]
    monkeypatch.undo()
    raw = samples(restored)
    assert torch.equal(load(tmp_path / "out").logits(restored.inputs(raw, 0), 1), restored.logits(raw, 1))


BACKBONE = '''
from torch import nn
from cmoe.backbones import Backbone
from cmoe.backbones.base import Features

class Tiny(Backbone):
    """One layer."""

    modalities = ("image",)

    def __init__(self, size: int = 8, *, input_shape, vocabulary=None, experts=None) -> None:
        super().__init__()
        self.width = size
        self.layer = nn.Linear(64, size)

    def forward(self, x, context):
        return Features(self.layer(x.flatten(1)))
'''


def test_the_plugins_of_the_model_travel_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "tasks").mkdir(parents=True)
    (home / "tasks" / "tiny.py").write_text(BACKBONE)
    monkeypatch.chdir(home)
    restored = of_run(make(home, "naive", model={"name": "tiny", "size": 5}))
    export(restored, tmp_path / "out")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    shutil.rmtree(home)
    raw = samples(restored)
    assert torch.equal(load(tmp_path / "out").logits(raw, 1), restored.logits(raw, 1))


@pytest.mark.parametrize("run", ["expand", "text", "bytes_expand", "growing"], indirect=True)
def test_mlflow_loads_it_and_answers_the_same(run: RunFolder, tmp_path: Path) -> None:
    import mlflow.pyfunc
    import pandas as pd

    restored = of_run(run)
    export(restored, tmp_path / "out")
    model = mlflow.pyfunc.load_model(str(tmp_path / "out" / MLFLOW))
    name = restored.stream.experiences[1].name
    params = {"task": name} if restored.why_task() else {}
    if restored.stream.vocabulary is not None:
        given: Any = pd.DataFrame({"text": ["book a flight", "send money"]})
    else:
        given = samples(restored).numpy()
    answers = model.predict(given, params=params)
    task = 1 if params else None
    if restored.stream.language:
        assert answers["bits_per_byte"].tolist() == [restored.language(t.encode(), task)[0] for t in given["text"]]
    elif restored.stream.vocabulary is None:
        expected = [a[0] for a in restored.classes(torch.from_numpy(given), task)]
        assert list(zip(answers["id"], answers["confidence"], strict=True)) == expected
        assert answers["class"].tolist() == [restored.class_names[c] for c, _ in expected]
    else:
        assert set(answers["class"]) <= set(restored.class_names)
    example = model.input_example
    assert (
        model.predict(example, params=model.metadata.load_input_example_params(str(tmp_path / "out" / MLFLOW)))
        is not None
    )
    if params:
        with pytest.raises(Exception, match=r"params\.task: expected one of"):
            model.predict(given)


@pytest.fixture
def served(run: RunFolder, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """The address of a real `mlflow models serve`, and the model that it serves."""
    restored = of_run(run)
    export(restored, tmp_path / "out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(tmp_path / "out" / MLFLOW)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "PATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail((tmp_path / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/invocations", restored
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def post(address: str, document: Any) -> tuple[int, Any]:
    request = urllib.request.Request(address, json.dumps(document).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_mlflow_serves_it(served: tuple[str, Any], run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    address, _restored = served
    from sklearn.datasets import load_digits

    x = load_digits().images[[4, 5]].astype("uint8")
    code, answer = post(address, {"inputs": x[:, None].tolist(), "params": {"task": "4+5"}})
    assert code == 200
    np.savez(tmp_path / "two.npz", x=x)
    capsys.readouterr()
    assert main.main(["predict", str(run.path), str(tmp_path / "two.npz"), "--task", "4+5", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predictions"]
    assert answer["predictions"] == [{k: p[k] for k in ("class", "id", "confidence")} for p in predicted]
    code, answer = post(address, {"inputs": x[:, None].tolist()})
    assert code == 400
    assert "params.task: expected one of 0 (0+1)" in answer["message"]
    assert post(address, {"inputs": x[:, None, :5].tolist(), "params": {"task": "4+5"}})[0] == 400
