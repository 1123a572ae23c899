"""Whole runs: stopped and gone on with, restored for predictions, exported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmoe import api, checkpoint
from cmoe.export import load, write
from cmoe.restored import of_run
from cmoe.session import Interrupted, Session
from cmoe.strategies import Strategy

from .helpers import DIGITS, merged, same
from .stepping import take, the


def ends_the_same(root: Path, chunks: int, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run that is stopped after so many chunks and resumed has the weights, states and metrics of one that was not;
    returns its last state."""

    def started(name: str, stop: Any = None) -> Any:
        plan, catalogue = api.plan_of(merged(DIGITS, {"tracking": {"root": str(root / name)}}, *changes))
        folder = api.new_run(plan)
        if stop is None:
            api.start_in(plan, folder, catalogue, api.data_folder())
        else:
            with pytest.raises(Interrupted):
                api.start_in(plan, folder, catalogue, api.data_folder(), stop=stop)
        return folder

    left = iter([False] * chunks)
    whole, broken = started("whole"), started("broken", lambda: next(left, True))
    assert broken.facts()["status"] == "INTERRUPTED"
    assert api.resume(broken)["status"] == "FINISHED"
    first, second = checkpoint.load(whole.state), checkpoint.load(broken.state)
    assert first is not None
    assert second is not None
    assert same(first["model"], second["model"])
    for a, b in zip(first["strategies"], second["strategies"], strict=True):
        equal(a, b)
    assert whole.facts()["metrics"] == broken.facts()["metrics"]
    return first


def equal(a: Any, b: Any) -> None:
    """Two states, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for key in a:
            equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            equal(one, other)
    else:
        assert a == b


def decides_the_same(of: Session, other: Session, kind: type[Strategy], tasks: Iterable[int | None]) -> None:
    """A run that takes over a finished one's model and a strategy's state decides as that does, bit for bit."""
    other.model.restore_structure(of.model.structure())
    other.model.load_state_dict(of.model.state_dict())
    the(other, kind).load_state_dict(the(of, kind).state_dict())
    x = take(of, 0, 0).x
    for task in tasks:
        with torch.no_grad():
            a, b = (the(each, kind).predict(x, task) for each in (of, other))
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def predicts_the_same(of: Session, target: Path, labelled: bool) -> None:
    """What is restored from a finished run's checkpoint, and from its export, predicts what its last row says."""
    restored = of_run(of.folder)
    write(restored, target)
    exported = load(target)
    row = of.record.rows[of.segments[-1].last]
    for each in (restored, exported):
        assert (each.why_task() is not None) == labelled
        for e in (s.last for s in of.segments):
            raw, task = of.stream.experiences[e].test.raw(), e if labelled else None
            found = [answer[0][0] for answer in each.classes(raw, task)]
            column = row.columns[e]
            recorded = column.task_pred if labelled else column.pred
            assert recorded is not None
            np.testing.assert_array_equal(found, recorded)
            assert torch.equal(each.logits(raw[:9], task), restored.logits(raw[:9], task))
