"""Exact resume of runs whose experts are merged, pruned, made of dense networks and unmade on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe import api, checkpoint
from cmoe.rundir import RunFolder
from cmoe.session import Interrupted

from .drawing import undrawn

FOUR = {"experts": 4, "router": {"name": "topk", "k": 2, "noise": "shazeer"}}
BASE: dict[str, Any] = {
    "stream": {"name": "split_digits", "limit": 3},
    "optimizer": {"name": "adam", "lr": 0.003, "reset": "never"},
    "trainer": {"epochs": 1, "batch_size": 16, "chunk": 3, "log_every": 4, "max_steps": 9},
    "tracking": {"enabled": False},
}
DENSE = {"name": "mlp", "hidden": [16, 12], "dropout": 0.1}
NEAREST = {"name": "expand", "init": "nearest", "noise": 0.1, "samples": 40}
RUNS: dict[str, dict[str, Any]] = {
    "prune": {"model": {**DENSE, "moe": FOUR}, "strategy": {"name": "prune", "keep": 2, "count": "experience"}},
    "merge": {"model": {**DENSE, "moe": FOUR}, "strategy": ["expand", {"name": "merge_experts", "experts": 3}]},
    "merge alike": {
        "model": {**DENSE, "moe": FOUR},
        "strategy": [{"name": "merge_experts", "experts": 2, "pairs": "alike"}, {"name": "replay", "size": 40}],
    },
    "replace": {"model": {**DENSE, "moe": FOUR}, "strategy": "merge_experts"},
    "upcycle": {
        "model": DENSE,
        "strategy": [{"name": "upcycle", "experts": 2, "noise": 0.1}, NEAREST, {"name": "online_ewc"}, "lwf"],
    },
    "upcycle a vit": {
        "model": {"name": "vit", "depth": 2, "dim": 16, "heads": 2, "dropout": 0.1},
        "strategy": [{"name": "upcycle", "experts": 2, "split": True, "layers": "last"}],
    },
    "collapse": {
        "model": {**DENSE, "moe": FOUR},
        "strategy": [{"name": "collapse", "after": 2, "how": "distil", "steps": 5}, "lwf"],
    },
    "there and back": {
        "model": DENSE,
        "strategy": [
            {"name": "upcycle", "experts": 2},
            {"name": "prune", "keep": 1, "assigned": True},
            {"name": "collapse", "after": 2},
        ],
    },
}
# what of a checkpoint is not equal, because it depends on when checkpoints were written
EXCEPT = ("wal", "number", "seconds", "environment", "version")


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch.setattr)
        yield


def equal(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: keys"]
        return [d for k in a for d in equal(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in equal(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} {b}"]


def points(run: RunFolder) -> list[tuple[int, str, float]]:
    """What was logged, in order, but for wall-clock times."""
    entries = [json.loads(line) for line in run.wal.read_text().splitlines()]
    return [
        (e["step"], name, value)
        for e in entries
        if e["kind"] == "metric"
        for name, value in e["values"].items()
        if not name.startswith("time/")
    ]


def begin(name: str, root: Path, stop_after: int | None) -> RunFolder:
    plan, catalogue = api.plan_of({**BASE, **RUNS[name]}, [f"tracking.root={root}"])
    folder = api.new_run(plan)
    if stop_after is None:
        api.start_in(plan, folder, catalogue, api.data_folder())
        return folder
    left = iter([False] * stop_after)
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, api.data_folder(), stop=lambda: next(left, True))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_the_same(name: str, tmp_path: Path) -> None:
    """Stopped within each experience in turn: before anything was done, after it was done once, and after twice."""
    whole = begin(name, tmp_path / "whole", None)
    cut = begin(name, tmp_path / "cut", 1)  # an experience has three chunks
    for _ in range(2):
        left = iter([False] * 2)
        with pytest.raises(Interrupted):
            api.resume(cut, stop=lambda left=left: next(left, True))
    assert api.resume(cut)["status"] == "FINISHED"
    first, second = checkpoint.load(whole.state), checkpoint.load(cut.state)
    assert first is not None
    assert second is not None
    assert [d for key in first if key not in EXCEPT for d in equal(first[key], second[key], key)] == []
    assert whole.facts()["metrics"] == cut.facts()["metrics"]
    assert points(whole) == points(cut)
    for folder in ("rows", "figures"):
        for path in (whole.path / folder).glob("*"):
            assert path.read_bytes() == (cut.path / folder / path.name).read_bytes(), path.name
    assert first["timeline"], "nothing happened to an expert"


@pytest.mark.parametrize("name", ["upcycle", "upcycle a vit", "there and back", "collapse"])
def test_a_finished_model_predicts_as_it_was_trained(name: str, tmp_path: Path) -> None:
    """What operations put into it is built again around the weights, without the training's strategies."""
    from cmoe.restored import of_run

    folder = begin(name, tmp_path, None)
    state = checkpoint.load(folder.state)
    assert state is not None
    restored = of_run(folder)
    assert restored.model.structure() == state["structure"]
    assert equal(dict(state["model"]), dict(restored.model.state_dict())) == []
    raw = restored.stream.experiences[0].train.x
    logits = restored.logits(raw[:5] if len(raw) else restored.raw_like(5), 0)
    assert logits.isfinite().all()
