"""Progressive networks against their formula, and what is frozen in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import PNN

from .helpers import LEARNED, WORLDS, opened, run
from .stepping import EXACT, HEADS, enter, goes_on_the_same, leave, take, the, walk
from .whole import decides_the_same

SPEC = {"strategy": "pnn", "model": {"hidden": [16, 12]}}
TASKS = {"stream": {"scenario": "task"}}


def after(root: Path, experiences: int, *changes: dict) -> Session:
    of = opened(root, EXACT, SPEC, *changes)
    for e in range(experiences):
        enter(of, e)
        walk(of, e, range(4))
        leave(of, e)
    return of


def formula(of: Session, column: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Activities and outputs of a finished column, every layer written out."""
    held = the(of, PNN).columns
    told = [formula(of, k, x)[0] for k in range(column)]
    own, laterals = held[column], held[column]["laterals"]
    h, acts = x.flatten(1), []
    layers = [*own["layers"], (torch.cat([w for w, _ in own["head"]]), torch.cat([b for _, b in own["head"]]))]
    for i, (w, b) in enumerate(layers):
        z = h @ w.T + b
        if i and column:
            scaled = [laterals[f"{i - 1}.share"][k] * told[k][i - 1] for k in range(column)]
            inner = torch.cat(scaled, 1) @ laterals[f"{i - 1}.adapter.weight"].T + laterals[f"{i - 1}.adapter.bias"]
            z = z + inner.clamp(min=0) @ laterals[f"{i - 1}.out.weight"].T
        h = z.clamp(min=0)
        acts.append(h)
    return acts[:-1], z


@pytest.mark.parametrize("head", ["shared", "growing", "multi"])
def test_every_column_is_its_formula(tmp_path: Path, head: str) -> None:
    of = after(tmp_path, 3, HEADS[head])
    x = take(of, 0, 0).x
    for task in range(3):
        logits = the(of, PNN).predict(x, task)
        assert logits is not None
        expected = formula(of, task, x)[1]
        torch.testing.assert_close(logits[:, : expected.shape[1]], expected)
    # the newest column is the model, told by the others through its layers
    with torch.no_grad():
        mine = of.model(x, of.context.route(2)).logits
    torch.testing.assert_close(mine, formula(of, 2, x)[1])
    assert the(of, PNN).predict(x, None) is None


def test_finished_columns_keep_every_bit(tmp_path: Path) -> None:
    of = after(tmp_path, 2, TASKS)
    x = take(of, 0, 0).x
    before = [the(of, PNN).predict(x, t) for t in (0, 1)]
    enter(of, 2)
    walk(of, 2, range(4))
    leave(of, 2)
    for t in (0, 1):
        later = the(of, PNN).predict(x, t)
        assert later is not None
        assert before[t] is not None
        assert torch.equal(later[:, : before[t].shape[1]], before[t])


def test_laterals_learn_and_older_columns_get_no_gradient(tmp_path: Path) -> None:
    of = after(tmp_path, 1)
    enter(of, 1)
    start = {n: p.detach().clone() for n, p in the(of, PNN).laterals.named_parameters()}
    of.learner.begin_phase(of.optimizer_options.build(_trained(of)), None)
    walk(of, 1, range(4))
    now = dict(the(of, PNN).laterals.named_parameters())
    assert all(not torch.equal(start[n], p) for n, p in now.items())
    assert not any(t.requires_grad for column in the(of, PNN).columns for w, b in column["layers"] for t in (w, b))


def _trained(of: Session) -> list:
    ((_, phase),) = of.remaining_phases(of.segments[1])
    assert phase.parameters is not None
    return list(phase.parameters())


def test_state_goes_on_exactly(tmp_path: Path) -> None:
    goes_on_the_same(tmp_path, PNN, SPEC)


def test_a_whole_run_forgets_nothing(tmp_path: Path) -> None:
    of = run(tmp_path, SPEC, TASKS, {"stream": {"limit": 3}, "trainer": {"epochs": 2}})
    values = of.folder.facts()["metrics"]
    assert values["task_il/forgetting_chaudhry"] == 0
    assert values["task_il/acc_macro"] > 0.8
    facts = the(of, PNN).facts()
    assert facts["pnn/columns"] == 3
    assert facts["pnn/bytes"] > 0
    assert the(of, PNN).parameters() > 2 * (64 * 16 + 16 * 12)
    other = opened(tmp_path / "b", SPEC, TASKS, {"stream": {"limit": 3}})
    decides_the_same(of, other, PNN, range(3))


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.pnn: expected model\.name 'mlp'"):
        opened(tmp_path, WORLDS["vit"], {"strategy": "pnn"})
    with pytest.raises(UserError, match=r"strategy\.pnn: expected a model without experts"):
        opened(tmp_path, {"strategy": "pnn", "model": {"moe": LEARNED}})
