"""Every kind of expert by configuration: a small stream with experts added, stopped and resumed, ends as if nothing had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cmoe
from cmoe import api, checkpoint
from cmoe.errors import UserError
from cmoe.rundir import RunFolder
from cmoe.session import Interrupted

from .drawing import undrawn

TOPK = {"name": "topk", "k": 2}
VIT = {"name": "vit", "patch": 4, "depth": 2, "dim": 16, "heads": 4}
CONVNET = {"name": "convnet", "patch": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 8]}
BYTES = {"name": "text_domains", "domains": None, "bytes_per_domain": 6000, "length": 16, "limit": 2}
LM = {"name": "byte_lm", "depth": 2, "dim": 16, "heads": 4, "hidden": 16}

MODELS: dict[str, tuple[dict[str, Any], int]] = {  # the backbone with its experts, and how many layers have any
    "lora": ({"name": "mlp", "hidden": [16], "moe": {"expert": {"name": "lora", "rank": 4}, "base": "frozen"}}, 1),
    "adapter": ({"name": "mlp", "hidden": [16], "moe": {"expert": "adapter", "base": "trained", "router": TOPK}}, 1),
    "conv": ({**CONVNET, "moe": {"experts": 2, "expert": "conv", "hidden": 8}}, 4),
    "separable": ({**CONVNET, "moe": {"expert": {"name": "conv", "separable": True}, "layers": "last", "base": "trained"}}, 1),
    "zero_computation": (
        {"name": "mlp", "hidden": [64, 64],
         "moe": {"experts": 2, "more": [{"expert": "zero"}, {"expert": "copy"}, {"expert": "constant", "experts": 2}]}}, 2),
    "sizes": ({**VIT, "moe": {"experts": 2, "hidden": 8, "shared": 1, "more": [{"hidden": 24}, {"expert": "lora"}]}}, 2),
    "moa": ({**LM, "moe": {"layers": "none", "attention": {"kind": "moa", "heads": 6, "router": TOPK}}}, 2),
    "moh": ({**LM, "moe": {"attention": {"kind": "moh", "heads": 3, "shared": 1, "layers": "last"}}}, 3),
    "moh_vit": ({**VIT, "moe": {"layers": "last", "attention": {"heads": 4}}}, 3),
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    return {
        "stream": BYTES if MODELS[name][0]["name"] == "byte_lm" else {"name": "split_digits", "limit": 2},
        "model": MODELS[name][0],
        "strategy": ["expand", {"name": "replay", "size": 20}],
        "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
        "trainer": {"batch_size": 16, "chunk": 2, "max_steps": 6},
        "tracking": {"enabled": False},
    }


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    undrawn(monkeypatch.setattr)


def state(run: RunFolder) -> dict[str, Any]:
    found = checkpoint.load(run.state)
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_added_experts_ends_the_same_when_it_was_stopped(name: str, tmp_path: Path) -> None:
    whole = cmoe.run(config(name), "tracking.root=whole")
    model = MODELS[name][0]["moe"]
    start = model.get("experts", 4) + sum(m.get("experts", 1) for m in model.get("more", []))
    heads = model.get("attention", {}).get("heads")
    structure = state(whole)["structure"]["moe"]
    assert len(structure) == MODELS[name][1]
    for layer, lived in structure.items():
        experts = [e for cohort in lived["cohorts"] for e in cohort["experts"]]
        assert len(experts) == (heads if "att" in layer else start) + 1
        assert [cohort["frozen"] for cohort in lived["cohorts"]][-2:] == [1, 0]
        assert sum(count for _, count in lived["usage"]) > 0

    plan, catalogue = api.plan_of(config(name), ["tracking.root=cut"])
    folder = api.new_run(plan)
    asked = iter([False] * 4)  # each of the two segments has three chunks
    with pytest.raises(Interrupted):
        api.start_in(plan, folder, catalogue, api.data_folder(), stop=lambda: next(asked, True))
    assert api.resume(folder)["status"] == "FINISHED"
    assert folder.facts()["metrics"] == whole.facts()["metrics"]
    assert state(folder)["structure"] == state(whole)["structure"]
    first, second = state(whole)["model"], state(folder)["model"]
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_lora_on_a_frozen_network_leaves_the_network_alone(tmp_path: Path) -> None:
    options = config("lora") | {"strategy": ["naive"]}
    shorter, longer = (cmoe.run(options, f"trainer.max_steps={n}", f"tracking.root={n}") for n in (1, 6))
    a, b = state(shorter)["model"], state(longer)["model"]
    base = [key for key in a if ".base." in key]
    experts = [key for key in a if ".cohorts." in key]
    assert base
    assert experts
    assert all(torch.equal(a[key], b[key]) for key in base)
    assert not any(torch.equal(a[key], b[key]) for key in experts)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "mlp", "moe": {"attention": {"kind": "moa"}}}, "model.moe.attention: expected none with 'mlp'"),
        ({**VIT, "moe": {"layers": "none"}}, "model.moe.layers: expected layers that get experts"),
        ({**VIT, "moe": {"attention": {"kind": "moa", "shared": 1}}}, "model.moe.attention.shared: expected 0 with kind 'moa'"),
        ({**VIT, "moe": {"attention": {"router": "soft"}}}, "model.moe.attention.router: expected a router that assigns"),
        ({**VIT, "moe": {"attention": {"router": "task_table"}}}, "model.moe.attention.router: expected a router that needs no"),
        ({**VIT, "moe": {"attention": {"router": "hash"}}}, "model.moe.attention.router: expected a router that 'vit' has"),
        ({**VIT, "moe": {"attention": {"layers": [2]}}}, "model.moe.attention.layers: expected indices from 0 to 1"),
        ({**VIT, "moe": {"expert": "conv"}}, "model.moe.expert: expected"),
        ({"name": "mlp", "hidden": [16], "moe": {"more": [{"expert": "copy"}]}}, "copy: expected an output of the input's size"),
        ({**CONVNET, "moe": {"expert": "conv", "dispatch": "grouped"}}, "dispatch: expected 'auto' or one of"),
        ({**CONVNET, "moe": {"expert": {"name": "conv", "kernel": 2}}}, "conv: kernel: expected an odd number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(model: dict[str, Any], said: str, tmp_path: Path) -> None:
    options = {"stream": {"name": "split_digits", "limit": 2}, "model": model, "tracking": {"enabled": False}}
    with pytest.raises(UserError) as refusal:
        cmoe.run(options, "trainer.max_steps=1")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_decoders_heads_have_a_causal_router(tmp_path: Path) -> None:
    options = config("moa") | {"model": {**LM, "moe": {"attention": {"router": "expert_choice"}}}}
    with pytest.raises(UserError, match=r"model\.moe\.attention\.router: expected a causal router.*'expert_choice'"):
        cmoe.run(options)
