"""SEED: Gaussians and their divergence against formulas, which expert learns, what stays, how experts vote."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import SEED
from cmoe.strategies.gaussians import divergence, fitted, log_density

from .helpers import BY_TASK, WORLDS, metrics, opened, run
from .stepping import DOMAIN, EXACT, enter, leave, take, the, walk
from .whole import ends_the_same, predicts_the_same

SPEC: dict[str, Any] = {
    "strategy": {"name": "seed", "most": 2},
    "model": {"moe": BY_TASK, "head": "growing", "hidden": [12]},
}


def after(root: Path, experiences: int, *changes: dict[str, Any]) -> Session:
    of = opened(root, EXACT, SPEC, *changes)
    for e in range(experiences):
        enter(of, e)
        walk(of, e, range(4))
        leave(of, e)
    return of


def features(of: Session, x: torch.Tensor, expert: int) -> np.ndarray:
    of.model.eval()
    with torch.no_grad():
        found = of.model(x, of.context.route(the(of, SEED).first[expert])).features
    of.model.train()
    return found.numpy()


def samples(of: Session, experience: int) -> tuple[torch.Tensor, np.ndarray]:
    split = of.stream.experiences[experience].train
    y = split.targets()
    assert y is not None
    return of.context.inputs(split.raw(), torch.full((len(y),), experience), None, train=False), y.numpy()


def test_gaussians_and_their_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.2], [0, 0, 2]]).double()  # fmt: skip
    mean, covariance = fitted(x, 0.1)
    plain = np.cov(x.numpy().T, bias=True)
    np.testing.assert_allclose(covariance.numpy(), 0.9 * plain + 0.1 * np.trace(plain) / 3 * np.eye(3))
    density = log_density(x, mean, torch.linalg.cholesky(covariance)) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(density.numpy(), multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(x.numpy()))
    other = fitted(0.5 * x + 1.0, 0.1)
    a = torch.distributions.MultivariateNormal(mean, covariance)
    b = torch.distributions.MultivariateNormal(*other)
    wanted = torch.distributions.kl_divergence(a, b) + torch.distributions.kl_divergence(b, a)
    assert divergence((mean, covariance), other) == pytest.approx(float(wanted))
    assert divergence(other, other) == pytest.approx(0.0, abs=1e-9)


def test_the_first_experiences_bring_experts_and_later_ones_train_the_one_that_tells_classes_apart_best(
    tmp_path: Path,
) -> None:
    of = after(tmp_path, 2)
    seed = the(of, SEED)
    x, y = samples(of, 2)
    spread = []
    for expert in (0, 1):
        found = torch.from_numpy(features(of, x, expert)).double()
        own = [fitted(found[torch.from_numpy(y == c)], seed.shrinkage) for c in np.unique(y)]
        spread.append(np.mean([divergence(a, b) for a, b in combinations(own, 2)]))
    enter(of, 2)
    best = int(np.argmax(spread))
    assert seed.chosen == {0: 0, 1: 1, 2: best}
    assert {len(layer.ids) for layer in of.model.moe_layers().values()} == {2}
    for layer in of.model.moe_layers().values():
        assert layer.tasks[2] == layer.tasks[best]
        assert set(layer.ids) - layer.frozen_ids == set(layer.tasks[best])


def test_only_the_chosen_expert_and_the_new_outputs_move(tmp_path: Path) -> None:
    of = after(tmp_path, 2)
    enter(of, 2)
    before = {n: p.detach().clone() for n, p in of.model.named_parameters()}
    trainable = {n for n, p in of.model.named_parameters() if p.requires_grad}
    walk(of, 2, range(3))
    moved = {n for n, p in of.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= trainable
    assert all("cohorts" in n or n.startswith("head.") for n in moved)


def test_gaussians_of_old_classes_stay(tmp_path: Path) -> None:
    of = after(tmp_path, 2)
    held = dict(the(of, SEED).gaussians)
    assert {(k, e) for k, e, _ in held} == {(0, 0), (0, 1), (1, 1)}
    enter(of, 2)
    walk(of, 2, range(3))
    leave(of, 2)
    now = the(of, SEED).gaussians
    assert all(now[key] is value for key, value in held.items())
    assert {(k, e) for k, e, _ in now} == {(0, 0), (0, 1), (1, 1), (0, 2), (1, 2)}
    x, y = samples(of, 2)
    for k in (0, 1):
        found = torch.from_numpy(features(of, x, k)).double()
        for c in np.unique(y):
            mean, covariance = fitted(found[torch.from_numpy(y == c)], the(of, SEED).shrinkage)
            torch.testing.assert_close(now[k, 2, int(c)][0], mean)
            torch.testing.assert_close(now[k, 2, int(c)][1], covariance)


def test_the_distance_to_the_old_features(tmp_path: Path) -> None:
    of = after(tmp_path, 2, {"strategy": {"name": "seed", "most": 2, "distillation": 0.7}})
    enter(of, 2)
    seed = the(of, SEED)
    assert seed.old is not None
    old = seed.old
    walk(of, 2, range(2))
    batch = take(of, 2, 5)
    output = of.model(batch.x, of.context.route(2))
    with torch.no_grad():
        before = old(batch.x, of.context.route(2)).features
    expected = 0.7 * sum(float(((a - b) ** 2).sum()) for a, b in zip(output.features.detach(), before, strict=True)) / 8
    assert float(seed.losses(output, batch)["features"].detach()) == pytest.approx(expected)
    assert expected > 0


def test_experts_vote_on_the_classes_that_they_know(tmp_path: Path) -> None:
    of = after(tmp_path, 3, {"strategy": {"name": "seed", "most": 2, "temperature": 3.0}})
    x = torch.cat([take(of, e, 6).x for e in range(3)])
    units = of.model.head.unit_classes().tolist()
    total, voters = np.zeros((len(x), len(units))), np.zeros(len(units))
    for k in (0, 1):
        found, scores = features(of, x, k), {}
        for (expert, _, c), (mean, covariance) in the(of, SEED).gaussians.items():
            if expert == k:
                scores[units.index(c)] = multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(found) / 3.0
        columns = list(scores)
        stacked = np.stack([scores[c] for c in columns], 1)
        vote = np.exp(stacked - stacked.max(1, keepdims=True))
        total[:, columns] += vote / vote.sum(1, keepdims=True)
        voters[columns] += 1
    of.model.eval()
    with torch.no_grad():
        logits = the(of, SEED).predict(x, None)
    assert logits is not None
    np.testing.assert_allclose(logits.exp().numpy(), total / np.maximum(voters, 1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_whole_runs(tmp_path: Path, scenario: str) -> None:
    head = "growing" if scenario == "class" else "multi"
    of = run(tmp_path, SPEC, {"stream": {"scenario": scenario}, "model": {"head": head, "hidden": [32]}, "trainer": {"epochs": 4}})  # fmt: skip
    values = metrics(of)
    assert values["class_il/acc_macro"] > 0.6
    assert values["task_il/acc_macro"] >= values["class_il/acc_macro"]
    assert the(of, SEED).facts()["seed/bytes"] == 8 * the(of, SEED).parameters()


def test_a_stopped_run_ends_the_same_and_is_restored(tmp_path: Path) -> None:
    changes = (SPEC, {"stream": {"limit": 3}, "trainer": {"max_steps": 4, "chunk": 1}})
    ends_the_same(tmp_path / "a", 10, *changes)
    predicts_the_same(run(tmp_path / "b", *changes), tmp_path / "export", labelled=False)


def test_texts_and_images(tmp_path: Path) -> None:
    for world in ("text_encoder", "vit"):
        own = {"model": {"moe": BY_TASK, "head": "growing"}, "trainer": {"max_steps": 3}}
        of = run(
            tmp_path / world, WORLDS[world], own, {"strategy": {"name": "seed", "most": 1}, "stream": {"limit": 2}}
        )
        assert metrics(of)["class_il/acc_macro"] is not None


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.moe: expected experts"):
        opened(tmp_path, {"strategy": "seed"})
    with pytest.raises(UserError, match=r"strategy\.seed: expected a stream with classes"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"model": {"moe": BY_TASK}, "strategy": "seed"})
    with pytest.raises(UserError, match=r"strategy\.seed\.shrinkage: expected a number above 0"):
        opened(tmp_path, SPEC, {"strategy": {"name": "seed", "shrinkage": 0.0}})
