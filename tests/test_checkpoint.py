"""Checkpoints: whole or not there, damage is noticed, nothing is unpickled, every generator goes on."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmoe import checkpoint
from cmoe.errors import RunFailed


def state(value: int) -> dict[str, Any]:
    w = torch.full((30, 30), float(value))
    return {"model": {"w": w, "b": w.bfloat16()}, "loads": {0: {"a": {3: 4}}}, "nested": [(1, None), {"x": [2.5]}]}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_is_loaded_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "state") is None
    for number in range(1, 13):
        checkpoint.save(tmp_path / "state", number, state(number), keep=3)
    assert names(tmp_path / "state") == [f"checkpoint-{n:06d}.pt" for n in (10, 11, 12)]
    loaded = checkpoint.load(tmp_path / "state")
    assert loaded is not None
    assert loaded["number"] == 12
    assert torch.equal(loaded["model"]["w"], state(12)["model"]["w"])
    assert loaded["model"]["b"].dtype == torch.bfloat16
    assert loaded["loads"] == {0: {"a": {3: 4}}}
    assert loaded["nested"] == [(1, None), {"x": [2.5]}]


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, number, state(number), keep=0)
    assert names(tmp_path) == ["checkpoint-000002.pt"]


@pytest.mark.parametrize("moment", ["fsync", "replace", "save"])
def test_an_interrupted_save_leaves_the_one_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch if moment == "save" else os, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert "checkpoint-000002.pt" not in names(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded["number"] == 1
    checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert names(tmp_path) == ["checkpoint-000001.pt", "checkpoint-000002.pt"]  # the half one is gone


def test_a_temporary_file_is_never_picked_up(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(1), keep=2)
    (tmp_path / "checkpoint-000009.tmp").write_bytes(path.read_bytes())
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded["number"] == 1
    path.unlink()
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_falls_back_to_the_checkpoint_before(seed: int, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    path = checkpoint.save(tmp_path, 2, state(2), keep=2)
    whole, rng = bytearray(path.read_bytes()), random.Random(seed)
    if seed < 10:
        path.write_bytes(whole[: rng.randrange(len(whole)) if seed else 0])
    elif seed < 12:
        path.write_bytes(rng.randbytes(len(whole)))
    else:  # a bit of the tensors themselves, which torch would load without a word
        at = rng.randrange(whole.find(b"\x00\x00\x00\x40" * 50), whole.rfind(b"\x00\x40" * 50))
        whole[at] ^= 1 << rng.randrange(8)
        path.write_bytes(whole)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded["number"] == 1


def test_when_none_can_be_read_each_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, number, state(number), keep=2).write_bytes(b"")
    with pytest.raises(RunFailed, match="no checkpoint can be read") as caught:
        checkpoint.load(tmp_path)
    assert "checkpoint-000001.pt" in str(caught.value)
    assert "checkpoint-000002.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    checkpoint.save(tmp_path, 2, {**state(2), "version": 99}, keep=2)
    with pytest.raises(RunFailed, match="expected checkpoint version 1, got 99"):
        checkpoint.load(tmp_path)


class Trap:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/cmoe-was-unpickled",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.pt"
    torch.save({"version": 1, "number": 1, "evil": Trap()}, path)
    with pytest.raises(RunFailed):
        checkpoint.load(tmp_path)
    path.write_bytes(pickle.dumps({"version": 1, "evil": Trap()}))
    with pytest.raises(RunFailed):
        checkpoint.load(tmp_path)
    assert not Path("/tmp/cmoe-was-unpickled").exists()


@pytest.mark.parametrize("value", [Trap(), np.zeros(3), np.float64(1.0), {1: {"deep": [object()]}}, Path("x"), print])
def test_what_could_not_be_loaded_is_refused_when_saved(value: object, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    with pytest.raises(RunFailed, match=r"strategies\.0\.\S+: expected tensors and plain containers"):
        checkpoint.save(tmp_path, 2, {"strategies": [{"mine": value}]}, keep=2)
    assert names(tmp_path) == ["checkpoint-000001.pt"]


def test_every_type_that_is_let_through_comes_back(tmp_path: Path) -> None:
    from collections import OrderedDict

    values = ["a", b"b", 1, 2.5, True, 1j, None, torch.float16, torch.device("cpu"), [1], (1,), {1}, torch.Size([2]),
              {"k": 1}, OrderedDict(k=1), torch.nn.Parameter(torch.ones(2)), torch.arange(3)]  # fmt: skip
    assert {type(v) for v in values} >= set(checkpoint._PLAIN)
    checkpoint.save(tmp_path, 1, {"all": values}, keep=1)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    for before, after in zip(values, loaded["all"], strict=True):
        assert type(before) is type(after)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),  # noqa: NPY002
        float(np.random.standard_normal()),  # noqa: NPY002
        float(torch.rand(())),
        *torch.randn(5).tolist(),
    ]


@pytest.mark.parametrize("before", [0, 1, 7])
def test_generators_go_on_where_they_were(before: int, tmp_path: Path) -> None:
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        checkpoint.seed_generators(2**62 + 5)
        for _ in range(before):
            draws()
        checkpoint.save(tmp_path, 1, {"generators": checkpoint.generators()}, keep=1)
        expected = [draws() for _ in range(3)]
        checkpoint.seed_generators(1)
        draws()
        loaded = checkpoint.load(tmp_path)
        assert loaded is not None
        checkpoint.restore_generators(loaded["generators"])
        assert [draws() for _ in range(3)] == expected
        checkpoint.seed_generators(2**62 + 5)
        for _ in range(before):
            draws()
        assert draws() == expected[0]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_state)
