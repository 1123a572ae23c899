"""Task inference: each kind against its formula, how answers are put together, beside every strategy that needs labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance

from cmoe.config.where import ConfigError
from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies.deciding import deciding
from cmoe.strategies.infer_task import InferTask

from .helpers import BY_TASK, WORLDS, metrics, opened, run
from .stepping import DOMAIN, EXACT, enter, leave, take, walk
from .whole import ends_the_same, predicts_the_same

KINDS = ("infer_gaussian", "infer_prototype", "infer_autoencoder", "infer_entropy")
TABLE: dict[str, Any] = {"model": {"moe": BY_TASK, "head": "growing"}, "stream": {"limit": 3}}
BESIDE: dict[str, dict[str, Any]] = {
    "expand": TABLE,
    "separate": {"stream": {"scenario": "task", "limit": 3}},
    "packnet": {"stream": {"scenario": "task", "limit": 3}},
    "hat": {"stream": {"scenario": "task", "limit": 3}},
    "pnn": {"stream": {"scenario": "task", "limit": 3}},
}


def strategies(beside: str, kind: str, **options: Any) -> dict[str, Any]:
    return {"strategy": [beside, {"name": kind, **options}]}


def after(root: Path, kind: str, experiences: int = 3, **options: Any) -> Session:
    of = opened(root, EXACT, TABLE, strategies("expand", kind, **options))
    for e in range(experiences):
        enter(of, e)
        walk(of, e, range(3))
        leave(of, e)
    of.model.eval()
    return of


def inferring(of: Session) -> InferTask:
    (found,) = (s for s in of.strategies if isinstance(s, InferTask))
    return found


def data(of: Session, experience: int) -> tuple[np.ndarray, np.ndarray]:
    split = of.stream.experiences[experience].train
    raw, y = split.raw(), split.targets()
    assert y is not None
    x = of.context.inputs(raw, torch.full((len(raw),), experience), None, train=False)
    return x.flatten(1).double().numpy(), y.numpy()


def answers(of: Session, x: torch.Tensor, task: int) -> torch.Tensor:
    columns = of.model.head.columns(of.stream.experiences[task].classes, task)
    with torch.no_grad():
        return of.model(x, of.context.route(task)).logits[:, columns].log_softmax(1)


@pytest.mark.parametrize("covariance", ["class", "shared"])
def test_gaussians_are_those_of_the_classes(tmp_path: Path, covariance: str) -> None:
    of = after(tmp_path, "infer_gaussian", covariance=covariance, shrinkage=0.3)
    x = take(of, 1, 5).x
    expected = np.zeros((len(x), 3))
    around, centres = [], {}
    for e in range(3):
        samples, y = data(of, e)
        for c in np.unique(y):
            centres[e, c] = samples[y == c].mean(0)
            around.append(((e, c), samples[y == c] - centres[e, c]))
    for e in range(3):
        densities = []
        for (of_e, c), deviations in around:
            if of_e == e:
                used = deviations if covariance == "class" else np.concatenate([d for _, d in around])
                sigma = shrunk_covariance(used.T @ used / len(used), 0.3)
                densities.append(multivariate_normal(centres[e, c], sigma).logpdf(x.flatten(1).numpy()))
        expected[:, e] = np.logaddexp.reduce(densities)
    scores = inferring(of).scores(x, lambda task: answers(of, x, task)).log_softmax(1)
    wanted = torch.tensor(expected).log_softmax(1)
    torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-6)


def test_prototypes_are_the_nearest_means(tmp_path: Path) -> None:
    of = after(tmp_path, "infer_prototype", temperature=2.5)
    x = take(of, 2, 4).x
    scores = inferring(of).scores(x, lambda task: answers(of, x, task))
    for e in range(3):
        samples, y = data(of, e)
        means = np.stack([samples[y == c].mean(0) for c in np.unique(y)])
        nearest = ((x.flatten(1).numpy()[:, None] - means) ** 2).sum(2).min(1)
        np.testing.assert_allclose(scores[:, e].numpy(), -nearest / 2.5, rtol=1e-9)


def test_the_most_certain_answer(tmp_path: Path) -> None:
    of = after(tmp_path, "infer_entropy", temperature=0.2)
    x = take(of, 2, 4).x
    scores = inferring(of).scores(x, lambda task: answers(of, x, task))
    for e in range(3):
        log_p = answers(of, x, e)
        entropy = -(log_p.exp() * log_p).sum(1) / math.log(2)
        torch.testing.assert_close(scores[:, e], -entropy / 0.2)


def test_the_autoencoder_with_the_least_error(tmp_path: Path) -> None:
    of = run(tmp_path, TABLE, strategies("expand", "infer_autoencoder", hidden=8, epochs=3), {"optimizer": {"name": "adam", "lr": 0.01}})  # fmt: skip
    infer: Any = inferring(of)
    assert sorted(infer.autoencoders) == [0, 1, 2]
    samples, _ = data(of, 0)
    torch.testing.assert_close(infer.shift.numpy(), samples.mean(0))
    x = take(of, 1, 3).x
    standard = ((x.flatten(1).double() - infer.shift) / infer.scale).float()
    scores = infer.scores(x, lambda task: answers(of, x, task))
    with torch.no_grad():
        for e in range(3):
            (first, second) = (infer.autoencoders[e][i] for i in (0, 2))
            hidden = (standard @ first.weight.T + first.bias).clamp(min=0)
            error = (hidden @ second.weight.T + second.bias - standard).square().mean(1)
            torch.testing.assert_close(scores[:, e].float(), -error / 2.0)
    assert metrics(of)["class_il/acc_macro"] > 0.5
    assert infer.facts()["infer_autoencoder/relatedness"] <= 1


@pytest.mark.parametrize("decide", ["best", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_put_together(tmp_path: Path, kind: str, decide: str) -> None:
    if kind == "infer_autoencoder":
        of = run(
            tmp_path,
            TABLE,
            strategies("expand", kind, decide=decide, hidden=4, epochs=1),
            {"trainer": {"max_steps": 3}},
        )
        of.model.eval()
    else:
        of = after(tmp_path, kind, decide=decide)
    infer = inferring(of)
    x = torch.cat([take(of, e, 6).x for e in range(3)])
    predict = deciding(of.strategies)
    assert predict is not None
    with torch.no_grad():
        logits = predict(x, None)
        p_BT = infer.scores(x, lambda task: answers(of, x, task).double()).softmax(1)
    assert logits is not None
    assert predict(x, 1) is None  # with a label the model answers
    expected = torch.zeros(len(x), len(of.model.head), dtype=torch.float64)
    for e in range(3):
        columns = of.model.head.columns(of.stream.experiences[e].classes, e)
        weight = p_BT[:, e] if decide == "all" else (p_BT.argmax(1) == e).double()
        expected[:, columns] += weight.unsqueeze(1) * answers(of, x, e).double().exp()
    torch.testing.assert_close(logits.softmax(1).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", BESIDE)
def test_beside_what_needs_labels(tmp_path: Path, beside: str, kind: str) -> None:
    of = run(tmp_path, BESIDE[beside], strategies(beside, kind), {"trainer": {"max_steps": 20}})
    values = metrics(of)
    assert values["class_il/acc_macro"] is not None
    assert values["task_il/acc_macro"] >= values["class_il/acc_macro"]
    assert (inferring(of).facts()[f"{kind}/bytes"] > 0) == (kind != "infer_entropy")


@pytest.mark.parametrize("kind", KINDS)
def test_on_features_of_texts(tmp_path: Path, kind: str) -> None:
    options = {} if kind == "infer_entropy" else {"on": "features"}
    world = {"model": {"moe": BY_TASK, "head": "growing"}, "trainer": {"max_steps": 5}, "stream": {"limit": 2}}
    of = run(tmp_path, WORLDS["text_encoder"], world, strategies("expand", kind, **options))
    assert metrics(of)["class_il/acc_macro"] is not None
    assert (inferring(of).parameters() > 0) == (kind != "infer_entropy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_the_same_and_is_restored(tmp_path: Path, kind: str) -> None:
    on = {} if kind == "infer_entropy" else {"on": "features"}
    changes = (TABLE, strategies("expand", kind, **on), {"trainer": {"max_steps": 4, "chunk": 1}})
    ends_the_same(tmp_path / "a", 6, *changes)
    predicts_the_same(run(tmp_path / "b", *changes), tmp_path / "export", labelled=False)


def test_domains_share_their_outputs(tmp_path: Path) -> None:
    """Without the label the answers of all domains count for the same outputs."""
    changes = {"model": {"moe": BY_TASK, "head": "growing"}, "stream": {"limit": 3, "scenario": "domain"}}
    of = run(tmp_path, changes, strategies("expand", "infer_gaussian", decide="all"), {"trainer": {"max_steps": 20}})
    assert len(of.model.head) == len(of.stream.experiences[0].classes)
    assert metrics(of)["class_il/acc_macro"] > 0.5
    predict = deciding(of.strategies)
    assert predict is not None
    of.model.eval()
    x = take(of, 1, 0).x
    with torch.no_grad():
        logits = predict(x, None)
        p_BT = (
            inferring(of).scores(x, lambda task: of.model(x, of.context.route(task)).logits.log_softmax(1)).softmax(1)
        )
        each = torch.stack([of.model(x, of.context.route(e)).logits.double().softmax(1) for e in range(3)], 1)
    assert logits is not None
    torch.testing.assert_close(logits.exp(), (p_BT.unsqueeze(2) * each).sum(1), rtol=1e-5, atol=1e-8)


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one strategy that infers the task"):
        opened(tmp_path, TABLE, {"strategy": ["expand", "infer_gaussian", "infer_entropy"]})
    with pytest.raises(UserError, match=r"infer_gaussian\.on: expected 'features' where inputs are tokens"):
        opened(tmp_path, WORLDS["text_encoder"], {"strategy": "infer_gaussian"})
    with pytest.raises(UserError, match=r"infer_prototype: expected a stream with classes"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"strategy": "infer_prototype"})
    with pytest.raises(UserError, match=r"infer_gaussian\.shrinkage: expected a number above 0"):
        opened(tmp_path, {"strategy": {"name": "infer_gaussian", "shrinkage": 0.0}})
    with pytest.raises(ConfigError, match="needs no task label in scenario 'class'"):
        opened(tmp_path, {"model": {"moe": BY_TASK, "head": "growing"}, "strategy": "expand"})
