"""Whole runs with routers of every kind in every modality, experts added on the way, and their state in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmoe import checkpoint

from .helpers import WORLDS, run, same, weights

ROUTERS: dict[str, dict[str, Any]] = {
    "soft": {"name": "soft", "slots": 2},
    "smear": {"name": "smear"},
    "by sequence": {"name": "topk", "level": "sequence", "expert_dropout": 0.3},
    "dselect_k": {"name": "dselect_k"},
    "stable_moe": {"name": "stable_moe", "after": 3},
    "product_keys": {"name": "product_keys", "k": 2, "heads": 2},
}
NOT_CAUSAL = ("soft", "smear", "by sequence")
TINY = {"name": "ffn", "bias": False}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_ends_well(tmp_path: Path, router: str, world: str) -> None:
    if world == "byte_lm" and router in NOT_CAUSAL:
        pytest.skip("refused in a decoder")
    moe: dict[str, Any] = {"experts": 3, "router": ROUTERS[router]}
    if router == "product_keys":
        moe |= {"experts": 9, "expert": TINY, "hidden": 1}
    changes = {
        "strategy": ["expand", "replay"],
        "stream": {"limit": 2, "scenario": "domain"},
        "trainer": {"max_steps": 4},
    }
    of = run(tmp_path, WORLDS[world], changes, {"model": {"moe": moe}})
    assert of.folder.facts()["status"] == "FINISHED"
    assert all(value.isfinite().all() for value in weights(of).values())
    for layer in of.model.moe_layers().values():
        assert len(layer.ids) == moe["experts"] + len(of.segments) - 1
    state = checkpoint.load(of.folder.state)
    assert state is not None
    fresh = of.context.fresh_model("again")
    fresh.restore_structure(state["structure"])
    fresh.load_state_dict(state["model"])
    assert same(fresh.state_dict(), weights(of))
    assert any(
        not torch.equal(v, fresh.state_dict()[n]) for n, v in of.context.fresh_model("other").state_dict().items()
    )
