"""Tasks packed into one network: what is pruned, what moves, and that old tasks stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import PackNet, Phase
from cmoe.streams import evaluation_batches

from .helpers import LEARNED, WORLDS, begin, opened, run
from .stepping import EXACT, take, the
from .whole import ends_the_same, predicts_the_same

TASK = {"stream": {"scenario": "task", "limit": 3}}
SHORT = {"trainer": {"max_steps": 5}}
PACKNET = {"strategy": {"name": "packnet", "prune": 0.6}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "kept": {"name": "adam", "lr": 0.01, "reset": "never"},
}


def answers(of: Session, experience: int) -> Tensor:
    """Logits of an experience's outputs for its test samples, with its task label."""
    of.model.eval()
    split = of.stream.experiences[experience].test
    own = [u for u, (_, t) in enumerate(of.model.head.units) if t == experience]
    with torch.no_grad():
        made = [
            the(of, PackNet).predict(of.context.placed(b.x), experience)
            for b in evaluation_batches(split, experience, of.stream.transform, 32)
        ]
    of.model.train()
    return torch.cat([m for m in made if m is not None])[..., own]


def fitted(of: Session, number: int, steps: int = 4) -> None:
    """A segment, phase by phase, some steps each."""
    begin(of, of.segments[number])
    for _, phase in of.remaining_phases(of.segments[number]):
        one_phase(of, number, phase, steps)


def one_phase(of: Session, number: int, phase: Phase, steps: int) -> None:
    of.learner.begin_phase(of.optimizer_options.build(of._trainable()), None)
    for strategy in of.strategies:
        strategy.before_phase(of.segments[number], phase)
    for i in range(steps):
        of.learner.step(take(of, number, i))
    for strategy in of.strategies:
        strategy.after_phase(of.segments[number], phase)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world", ["mlp", "vit", "text_encoder"])
def test_old_tasks_keep_every_bit(tmp_path: Path, world: str, optimizer: str) -> None:
    then: dict[int, Tensor] = {}
    compared = []

    def watch(of: Session, row: int) -> None:
        for e, logits in then.items():
            assert torch.equal(answers(of, e), logits), (row, e)
            compared.append(e)
        then[row] = answers(of, row)

    limit = {"stream": {"limit": 2}} if world == "text_encoder" else {}
    clip = {"trainer": {"clip_norm": 1.0}}
    changes = (WORLDS[world], TASK, SHORT, PACKNET, limit, clip, {"optimizer": OPTIMIZERS[optimizer]})
    of = run(tmp_path, *changes, on_row=watch)
    assert len(compared) == sum(range(len(of.segments)))
    assert all(not torch.equal(a, b) for a, b in zip(then.values(), list(then.values())[1:], strict=False))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.73])
def test_the_smallest_free_weights_of_each_layer_go(tmp_path: Path, share: float) -> None:
    of = opened(tmp_path, EXACT, WORLDS["mlp"], TASK, {"strategy": {"name": "packnet", "prune": share}})
    packnet = the(of, PackNet)
    for number in range(3):
        begin(of, of.segments[number])
        (_, train), (_, retrain) = of.remaining_phases(of.segments[number])
        owners = {n: o.clone() for n, o in packnet.owner.items()}
        with torch.no_grad():
            for weight in packnet.layers.values():
                weight.copy_(torch.randn_like(weight))
        before = {n: w.detach().clone() for n, w in packnet.layers.items()}
        one_phase(of, number, train, 0)
        for name, weight in packnet.layers.items():
            free = [i for i, o in enumerate(owners[name].flatten().tolist()) if o == 0]
            values = before[name].flatten()
            ranked = sorted(free, key=lambda i: abs(float(values[i])))
            gone = set(ranked[: round(share * len(free))])
            for i, owner in enumerate(packnet.owner[name].flatten().tolist()):
                was = int(owners[name].flatten()[i])
                assert owner == (was or (0 if i in gone else number + 1))
                assert float(weight.detach().flatten()[i]) == (0.0 if i in gone else float(values[i]))
        assert retrain.name == "retrain"
    assert packnet.facts()["packnet/free"] == pytest.approx(share**3, abs=0.02)
    assert packnet.facts()["packnet/bytes"] == 2 * sum(w.numel() for w in packnet.layers.values())


def test_what_moves_in_each_phase(tmp_path: Path) -> None:
    of = opened(tmp_path, WORLDS["mlp"], TASK, PACKNET, {"optimizer": OPTIMIZERS["momentum"]})
    packnet = the(of, PackNet)
    fitted(of, 0)
    begin(of, of.segments[1])
    for phase, movable in zip([p for _, p in of.remaining_phases(of.segments[1])], (0, 2), strict=True):
        owners = {n: o.clone() for n, o in packnet.owner.items()}
        before = {n: p.detach().clone() for n, p in of.model.named_parameters()}
        of.learner.begin_phase(of.optimizer_options.build(of._trainable()), None)
        packnet.before_phase(of.segments[1], phase)
        for i in range(4):
            of.learner.step(take(of, 1, i))
        for name, parameter in of.model.named_parameters():
            same = parameter == before[name]
            if name in owners:
                assert same[owners[name] != movable].all()
                assert not same[owners[name] == movable].all()
            else:  # biases learned in the first experience; of the heads the task's own learns
                assert same.all() == (name not in ("head.blocks.1.weight", "head.blocks.1.bias"))
        packnet.after_phase(of.segments[1], phase)


def test_a_task_sees_its_own_and_earlier_weights(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, WORLDS["mlp"], TASK, PACKNET)
    for number in range(3):
        fitted(of, number)
    packnet = the(of, PackNet)
    x = take(of, 0, 0).x
    for task in range(3):
        h = x.flatten(1)
        for i in range(2):
            owner = packnet.owner[f"backbone.layers.{i}.weight"]
            layer = of.model.backbone.get_submodule(f"layers.{i}")
            mask = ((owner >= 1) & (owner <= task + 1)).double()
            h = (h @ (layer.get_parameter("weight") * mask).T + layer.get_parameter("bias")).relu()
        found = packnet.predict(x, task)
        assert found is not None
        torch.testing.assert_close(found, of.model.head(h), rtol=1e-12, atol=1e-12)
    assert packnet.predict(x, None) is None
    assert packnet.predict(x, 3) is None, "a task that is not learned has no weights"


@pytest.mark.parametrize("chunks", [2, 4, 7, 10])
def test_a_stopped_run_ends_the_same(tmp_path: Path, chunks: int) -> None:
    """Stopped in either experience, within and at the end of training and while training on what is left."""
    more = {"trainer": {"chunk": 2, "max_steps": 6, "threads": 1}, "stream": {"limit": 2}}
    state = ends_the_same(tmp_path, chunks, TASK, PACKNET, {"optimizer": OPTIMIZERS["kept"]}, more)
    assert state["strategies"][0]["segment_of"] == {0: 1, 1: 2}


def test_predictions_and_exports_use_the_masks(tmp_path: Path) -> None:
    of = run(tmp_path, TASK, SHORT, PACKNET)
    predicts_the_same(of, tmp_path / "export", labelled=True)
    column = of.record.rows[2].columns[0]
    assert column.pred is None
    assert column.task_pred is not None


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision(tmp_path: Path, precision: str) -> None:
    of = run(tmp_path, TASK, SHORT, PACKNET, {"trainer": {"precision": precision}, "stream": {"limit": 2}})
    assert of.folder.facts()["status"] == "FINISHED"


def test_language_without_retraining(tmp_path: Path) -> None:
    spec = {"strategy": {"name": "packnet", "retrain": 0}, "trainer": {"max_steps": 3}}
    of = run(tmp_path, WORLDS["byte_lm"], {"stream": {"scenario": "task"}}, spec)
    assert of.learner.steps == 3 * len(of.segments)


@pytest.mark.parametrize("other", ["online_ewc", "si", "mas"])
def test_beside_others(tmp_path: Path, other: str) -> None:
    assert run(tmp_path, TASK, SHORT, {"strategy": [other, "packnet"]}).folder.facts()["status"] == "FINISHED"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": {"scenario": "class"}}, "a strategy that needs no task label in scenario 'class'"),
    ({"model": {"head": "shared"}}, "strategy.packnet: expected model.head 'multi'"),
    ({"model": {"moe": LEARNED}}, "strategy.packnet: expected a model without experts"),
    ({"model": {"hidden": []}}, "strategy.packnet: expected a backbone with linear layers"),
    ({"strategy": ["packnet", "replay"]}, "strategy.packnet: expected no 'replay' beside it, its samples of old tasks"),
    ({"strategy": ["packnet", "gdumb"]}, "strategy.packnet: expected no 'gdumb' beside it, it would draw"),
    ({"strategy": ["packnet", "hat"]}, "one strategy with its own way to predict"),
    ({"strategy": {"name": "packnet", "prune": 1.0}}, "prune"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, TASK, PACKNET, changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
