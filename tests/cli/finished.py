"""Small finished runs of every kind, for the commands that work on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmoe import api
from cmoe.rundir import RunFolder

TABLE = {"experts": 1, "router": "task_table"}
MODEL = {"name": "mlp", "hidden": [16]}
TEXT = {"name": "text_encoder", "dim": 16, "heads": 2, "depth": 1}
BYTES = {"name": "byte_lm", "dim": 16, "heads": 2, "depth": 1}

# every head, every kind of input, with and without a router that needs the task
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {"strategy": "naive"},
    "seen": {"strategy": {"name": "replay", "size": 20}, "model": {**MODEL, "eval_outputs": "seen"}},
    "growing": {"strategy": "online_ewc", "model": {**MODEL, "head": "growing"}},
    "topk": {"strategy": "lwf", "scenario": "task", "model": {**MODEL, "moe": {"experts": 3, "router": "topk"}}},
    "expand": {"strategy": "expand", "scenario": "task", "model": {**MODEL, "moe": TABLE}},
    "separate": {"strategy": "separate", "scenario": "task", "model": {**MODEL, "eval_outputs": "task"}},
    "domain": {"strategy": "naive", "scenario": "domain"},
    "joint": {"strategy": "joint", "stream": {"name": "digit_attributes"}, "model": {**MODEL, "head": "multi"}},
    "float64": {"strategy": "naive", "precision": "64-true"},
    "bf16": {"strategy": "naive", "precision": "bf16-mixed"},
    "convnet": {
        "strategy": "naive",
        "model": {"name": "convnet", "dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch": 1},
    },
    "text": {"strategy": "naive", "stream": {"name": "clinc150", "vocabulary": 64, "length": 6}, "model": TEXT},
    "bytes": {"strategy": "naive", "stream": "text", "model": BYTES},
    "bytes_expand": {"strategy": "expand", "stream": "text", "scenario": "task", "model": {**BYTES, "moe": TABLE}},
    "bytes_separate": {"strategy": "separate", "stream": "text", "scenario": "task", "model": BYTES},
}


def make(root: Path, name: str, seed: int = 0, tracking: bool = False, **more: Any) -> RunFolder:
    """A run of a variant under `<root>/mlruns`, trained for a few steps."""
    data = root / "data"
    if not data.exists():
        write_data(data)
    options = {"model": MODEL, "scenario": None, "precision": "32-true", "stream": None, **VARIANTS[name], **more}
    stream = options["stream"] or {"name": "split_digits"}
    if stream == "text":
        stream = {"name": "text_domains", "length": 16, "domains": {n: f"{n}.txt" for n in ("one", "two")}}
    if options["scenario"]:
        stream = {**stream, "scenario": options["scenario"]}
    config = {
        "experiment": options.get("experiment", "digits"),
        "label": options.get("label", name),
        "seed": seed,
        "stream": stream,
        "model": options["model"],
        "strategy": options["strategy"],
        "optimizer": {"name": "adam", "lr": 0.01},
        "trainer": {"max_steps": options.get("max_steps", 6), "batch_size": 16, "precision": options["precision"]},
        "tracking": {"root": str(root / "mlruns"), "enabled": tracking},
    }
    return api.run(config, data=data)


def write_data(data: Path) -> None:
    """Texts of two domains, and a data set in the form of CLINC150."""
    data.mkdir(parents=True)
    (data / "one.txt").write_text("".join(f"line {i} of the first text\n" for i in range(120)))
    (data / "two.txt").write_text("".join(f"{i * i};{i};x\n" for i in range(300)))
    (data / "clinc150").mkdir()
    domains = {"bank": ["balance", "transfer"], "travel": ["flight", "visa"]}
    words = {"balance": "how much money", "transfer": "send money", "flight": "book a flight", "visa": "need a visa"}
    (data / "clinc150" / "domains.json").write_text(json.dumps(domains))
    full = {
        part: [[f"{words[i]} {n}", i] for intents in domains.values() for i in intents for n in range(count)]
        for part, count in (("train", 20), ("val", 4), ("test", 6))
    }
    (data / "clinc150" / "data_full.json").write_text(json.dumps(full))
