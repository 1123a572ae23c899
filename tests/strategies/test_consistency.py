"""The second pass against its formula, and a run that is stopped on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.learners import Batch
from cmoe.moe import losses
from cmoe.session import Session

from .helpers import WORLDS, begin, merged, opened, run, weights
from .whole import ends_the_same

RANDOM = {"model": {"moe": {"experts": 4, "router": "random"}}}
STRATEGY = {"strategy": {"name": "consistency", "alpha": 0.7}}
HEADS: dict[str, dict[str, Any]] = {
    "shared": {},
    "growing": {"model": {"head": "growing"}},
    "multi": {"stream": {"scenario": "task"}},
    "seen": {"model": {"train_outputs": "seen"}},
}


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def divergence(first: Tensor, second: Tensor) -> float:
    p, q = softmax(first.detach().double().numpy()), softmax(second.detach().double().numpy())
    return float(0.5 * ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean())


def losses_of(of: Session, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The strategy's losses, and the logits of the two passes that they are from."""
    torch.manual_seed(5)
    first = of.model(batch.x, of.context.route(batch.task, training=True))
    state = torch.get_rng_state()
    found = of.strategies[0].losses(first, batch)
    torch.set_rng_state(state)
    second = of.model(batch.x, of.context.route(batch.task, training=True))
    return found, first.logits, second.logits


def batch_of(task: int | Tensor, y: Tensor, seed: int = 1) -> Batch:
    x = torch.rand(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(x, y, task, torch.arange(len(y)), len(y))


@pytest.mark.parametrize("head", HEADS)
def test_both_losses_are_their_formulas(tmp_path: Path, head: str) -> None:
    of = opened(tmp_path, STRATEGY, RANDOM, HEADS[head])
    for segment in of.segments[:2]:
        begin(of, segment)
    classes = of.stream.experiences[1].classes
    batch = batch_of(1, torch.tensor(list(classes) * 4))
    found, first, second = losses_of(of, batch)
    assert list(found) == ["second_pass", "consistency"]
    (p, targets), (q, _) = (of.objective.select(logits, batch) for logits in (first, second))
    assert p.shape[1] == {"multi": 2, "growing": 4, "seen": 4}.get(head, 10)
    expected = 0.7 * divergence(p, q)
    assert expected > 1e-6
    assert float(found["consistency"].detach()) == pytest.approx(expected, rel=1e-4)
    log_q = np.log(softmax(q.detach().double().numpy()))
    task_loss = -log_q[np.arange(len(targets)), targets.numpy()].mean()
    assert float(found["second_pass"].detach()) == pytest.approx(task_loss, rel=1e-5)


def test_a_batch_of_several_tasks_sees_each_its_own_outputs(tmp_path: Path) -> None:
    """Outputs of other tasks are at −inf, in both passes: no NaN in the loss or its gradient."""
    of = opened(tmp_path, STRATEGY, RANDOM, HEADS["multi"])
    for segment in of.segments[:2]:
        begin(of, segment)
    task = torch.arange(12) % 2
    y = torch.tensor([list(of.stream.experiences[int(t)].classes)[i % 2] for i, t in enumerate(task)])
    batch = batch_of(task, y)
    found, first, second = losses_of(of, batch)
    (p, _), (q, _) = (of.objective.select(logits, batch) for logits in (first, second))
    own = p > -torch.inf
    assert own.sum(1).tolist() == [2] * 12
    expected = 0.7 * divergence(p[own].view(12, 2), q[own].view(12, 2))
    assert float(found["consistency"].detach()) == pytest.approx(expected, rel=1e-4)
    sum(found.values()).backward()
    assert all(g.grad.isfinite().all() for g in of.model.parameters() if g.grad is not None)


def test_padding_of_a_text_counts_for_nothing(tmp_path: Path) -> None:
    of = opened(tmp_path, STRATEGY, merged(WORLDS["byte_lm"], RANDOM, {"stream": {"scenario": "domain"}}))
    begin(of, of.segments[0])
    length = of.stream.input_shape[0]
    assert length > 4
    x = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(0))
    x[1, 2:], x[2, length - 1 :] = PADDING, PADDING
    y = torch.cat((x[:, 1:], torch.full((3, 1), PADDING)), 1)
    found, first, second = losses_of(of, Batch(x, y, 0, torch.arange(3), 3))
    real = (y != PADDING).flatten()
    expected = 0.7 * divergence(first.flatten(0, 1)[real], second.flatten(0, 1)[real])
    assert float(found["consistency"].detach()) == pytest.approx(expected, rel=1e-4)


def test_routers_losses_of_the_second_pass_count_too(tmp_path: Path) -> None:
    noisy = {"model": {"moe": {"experts": 4, "router": {"name": "noisy_topk"}}}}
    of = opened(tmp_path, STRATEGY, noisy)
    begin(of, of.segments[0])
    batch = batch_of(0, torch.zeros(8, dtype=torch.int64))
    torch.manual_seed(5)
    first = of.model(batch.x, of.context.route(0, training=True))
    state = torch.get_rng_state()
    found = of.strategies[0].losses(first, batch)
    torch.set_rng_state(state)
    second = of.model(batch.x, of.context.route(0, training=True))
    auxiliary = sum(float(v.detach()) for v in second.auxiliary().values())
    assert auxiliary > 0.01
    expected = float(of.objective.loss(second.logits, batch).detach()) + auxiliary
    assert float(found["second_pass"].detach()) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_draws_nothing_agrees_with_itself(tmp_path: Path) -> None:
    of = opened(tmp_path, STRATEGY)
    begin(of, of.segments[0])
    batch = batch_of(0, torch.zeros(8, dtype=torch.int64))
    found, first, _ = losses_of(of, batch)
    assert float(found["consistency"].detach()) == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(found["second_pass"], of.objective.loss(first, batch))


def test_it_makes_random_experts_agree(tmp_path: Path) -> None:
    """The same steps with a larger weight end in predictions that depend less on which experts were drawn."""

    def disagreement(alpha: float) -> float:
        of = run(tmp_path / str(alpha), {"strategy": {"name": "consistency", "alpha": alpha}}, RANDOM,
                 {"stream": {"limit": 1}, "trainer": {"epochs": 3}})  # fmt: skip
        of.model.train()
        x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        with torch.no_grad():
            p, q = (of.model(x, of.context.route(0)).logits for _ in range(2))
        return float(losses.consistency_loss(p, q))

    assert disagreement(20.0) < 0.5 * disagreement(0.0)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_stopped_run_ends_the_same(tmp_path: Path, chunks: int) -> None:
    """What is drawn in either pass comes from generators that a checkpoint holds."""
    more = {"stream": {"limit": 2}, "trainer": {"chunk": 3}, "model": {"dropout": 0.2}}
    ends_the_same(tmp_path, chunks, STRATEGY, RANDOM, more)


def test_beside_replay(tmp_path: Path) -> None:
    of = run(
        tmp_path, {"strategy": ["replay", "consistency"]}, RANDOM, {"stream": {"limit": 2}, "trainer": {"max_steps": 5}}
    )
    assert of.folder.facts()["status"] == "FINISHED"
    assert all(value.isfinite().all() for value in weights(of).values())
