"""Answers of single experts against models that have nothing else, and joined answers against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from cmoe.backbones import MLP, ByteLM, ExpertLayers
from cmoe.learners import Head, Model
from cmoe.learners.answers import Answers
from cmoe.learners.evaluate import Traffic
from cmoe.learners.examine import Sample, evenly, examine
from cmoe.learners.objective import PADDING
from cmoe.learners.reading import read_bytes, read_classes
from cmoe.moe import ExpertView, RouteContext, Router, Routing
from cmoe.moe.routers import TaskTable, TopK
from cmoe.moe.routing import SoftRouting

CPU = torch.device("cpu")
CLASSES = 5


def classifier(router: Any = TopK, hidden: int = 2, shared: int = 0, **options: Any) -> Model:
    torch.manual_seed(0)
    layers = ExpertLayers(3, lambda dim: router(dim, **options), shared=shared)
    made = Model(MLP(hidden=[7] * hidden, input_shape=(4,), experts=layers), Head(7, "shared"))
    made.head.add(range(CLASSES))
    for p in made.parameters():
        p.data.mul_(2)
    return made.double().eval()


def samples(model: Model, parts: tuple[int, ...] = (9, 5), columns: Tensor | None = None) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    read = read_classes(model.head.unit_classes(), columns)
    batches = [
        (
            torch.randn(n, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for n in parts
    ]
    return [Sample(0, batches, read), Sample(1, batches[:1], read)]


def only(model: Model, name: str, expert: int) -> Model:
    """A copy whose layer has no other expert; top-k before the softmax then gives it weight 1."""
    other = copy.deepcopy(model)
    layer = other.moe_layers()[name]
    layer.remove([e for e in layer.ids if e != expert])
    return other.eval()


def log_probs(model: Model, sample: Sample) -> tuple[Tensor, Tensor]:
    """Of all samples, without any of the code under test."""
    x, y = (torch.cat([b[k] for b in sample.batches]) for k in (0, 1))
    return model(x, RouteContext(task=sample.experience)).logits.detach().log_softmax(1), y


def close(answers: Answers, expected: dict[int, tuple[Tensor, Tensor]]) -> None:
    table = answers.to_dict()
    logs, y = (torch.cat([e[k] for e in expected.values()]) for k in (0, 1))
    assert table["accuracy"] == pytest.approx(float((logs.argmax(1) == y).double().mean()))
    assert table["nll"] == pytest.approx(F.nll_loss(logs, y).item(), rel=1e-5)
    onehot = F.one_hot(y, logs.shape[1]).double()
    assert table["brier"] == pytest.approx(float((logs.exp() - onehot).square().sum(1).mean()), rel=1e-5)
    for j, (own, target) in expected.items():
        assert table["accuracies"][j] == pytest.approx(float((own.argmax(1) == target).double().mean()))


@pytest.mark.parametrize("name", ["layers.0", "layers.1"])
def test_an_expert_alone_is_the_model_with_nothing_else_in_its_layer(name: str) -> None:
    model = classifier(k=2)
    found = examine(model, samples(model), CPU)
    close(found.model, {s.experience: log_probs(model, s) for s in samples(model)})
    for expert in (0, 1, 2):
        other = only(model, name, expert)
        close(found.layers[name].alone[expert], {s.experience: log_probs(other, s) for s in samples(other)})


@pytest.mark.parametrize("name", ["layers.0", "layers.1"])
def test_the_model_without_an_expert_is_the_model_after_its_removal(name: str) -> None:
    model = classifier(k=2)
    found = examine(model, samples(model), CPU)
    for expert in (0, 1, 2):
        other = copy.deepcopy(model)
        other.moe_layers()[name].remove([expert])
        close(found.layers[name].without[expert], {s.experience: log_probs(other.eval(), s) for s in samples(other)})


def test_joined_answers_are_their_formulas() -> None:
    model = classifier(k=2, hidden=1)
    found = examine(model, samples(model), CPU).layers["layers.0"]
    layer = model.moe_layers()["layers.0"]
    expected: dict[str, dict[int, tuple[Tensor, Tensor]]] = {"uniform": {}, "log": {}, "gate": {}}
    for sample in samples(model):
        each = []
        for expert in layer.ids:
            logs, y = log_probs(only(model, "layers.0", expert), sample)
            each.append(logs)
        logs_ENC, j = torch.stack(each), sample.experience
        x = torch.cat([b[0] for b in sample.batches])
        routing = layer(x, RouteContext())[1]
        gate = torch.zeros(len(x), 3, dtype=torch.float64).scatter(1, routing.ids, routing.weights.detach())
        expected["uniform"][j] = logs_ENC.exp().mean(0).log(), y
        geometric = logs_ENC.exp().prod(0) ** (1 / 3)
        expected["log"][j] = (geometric / geometric.sum(1, keepdim=True)).log(), y
        expected["gate"][j] = (gate.T.unsqueeze(2) * logs_ENC.exp()).sum(0).log(), y
    assert found.pools.keys() == expected.keys()
    for name, by_experience in expected.items():
        close(found.pools[name], by_experience)


def test_only_what_the_label_allows_is_joined_and_missed() -> None:
    model = classifier(TaskTable, hidden=1)
    layer = model.moe_layers()["layers.0"]
    layer.assign([0], 0)
    layer.assign([1, 2], 1)
    found = examine(model, samples(model), CPU)
    asked = found.layers["layers.0"]
    # task 0 has one expert: every way to join its answers is the model itself
    for pool in asked.pools.values():
        assert torch.equal(pool.correct[0], found.model.correct[0])
        torch.testing.assert_close(pool.nll[0], found.model.nll[0])
    for expert, task in ((1, 0), (2, 0), (0, 1)):  # never seen, never missed
        assert torch.equal(asked.without[expert].nll[task], found.model.nll[task])
    chosen = asked.without[0].choice[0]
    assert (chosen == chosen[0]).all()  # without its only expert the layer gives 0 for everything
    assert asked.alone.keys() == {0, 1, 2}


@pytest.mark.parametrize("shared", [0, 2])
def test_outputs_are_those_of_the_experts_on_the_same_tokens(shared: int) -> None:
    model = classifier(k=1, hidden=1, shared=shared)
    found = examine(model, samples(model), CPU).layers["layers.0"]
    layer = model.moe_layers()["layers.0"]
    x = torch.cat([x for s in samples(model) for x, _ in s.batches])
    for expert in layer.ids:
        key, row = layer.view.where[expert]
        expected = layer.cohorts[key].single(x, row).detach().float()
        torch.testing.assert_close(torch.cat(found.outputs[expert]), expected)


def test_nothing_of_the_model_changes() -> None:
    model = classifier(k=2, noise="gaussian", capacity=0.8)
    weights, structure = copy.deepcopy(model.state_dict()), copy.deepcopy(model.structure())
    examine(model, samples(model), CPU)
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    assert model.structure() == structure
    assert not model.training
    model.train()
    model(torch.randn(3, 4, dtype=torch.float64), RouteContext(training=True)).logits.sum().backward()


class Slots(Router):
    """Soft MoE with one slot an expert and nothing learned: it assigns no token to anyone."""

    def forward(self, x_TD: Tensor, context: RouteContext, experts: ExpertView) -> Routing:
        scores_TE = x_TD[:, : len(experts)]
        return SoftRouting(scores_TE.softmax(0).unsqueeze(0), scores_TE.softmax(1).unsqueeze(0), 1, experts.ids)


class Stubborn(TopK):
    """A router that needs all experts."""

    def forward(self, x_TD: Tensor, context: RouteContext, experts: Any) -> Routing:
        if context.visible is not None:
            raise ValueError("needs all of them")
        return super().forward(x_TD, context, experts)


def test_what_cannot_be_asked_is_left_out_with_a_reason() -> None:
    found = examine(m := classifier(Slots, hidden=1), samples(m), CPU)
    assert found.left_out == {"layers.0": "routing of kind 'soft' gives no token to one expert"}
    assert found.layers == {}
    assert found.model.to_dict()["accuracy"] >= 0
    traffic = Traffic()
    traffic.add(m(samples(m)[0].batches[0][0], RouteContext()).routings)
    assert traffic.kinds == {"layers.0": "soft"}
    assert traffic.load == traffic.routes == {}
    found = examine(m := classifier(Stubborn, hidden=1), samples(m), CPU)
    asked = found.layers["layers.0"]
    assert asked.without == {}
    assert asked.reasons["drop_one"] == "the router refuses to do without expert 0: needs all of them"
    assert asked.alone.keys() == {0, 1, 2}


def test_samples_of_unknown_classes_are_left_out() -> None:
    model = classifier(hidden=1)
    found = examine(model, samples(model, columns=torch.tensor([1, 3])), CPU)
    known = sum(int(((y == 1) | (y == 3)).sum()) for _, y in samples(model)[0].batches)
    assert len(found.model.correct[0]) == known > 0
    assert set(found.model.choices().tolist()) <= {0, 1}


@pytest.mark.parametrize("blocks", [1, 2])
def test_bytes_are_predictions_of_their_own(blocks: int) -> None:
    torch.manual_seed(0)
    layers = ExpertLayers(2, lambda dim: TopK(dim, k=1, order="after"))
    model = Model(ByteLM(1, 16, 2, input_shape=(6,), vocabulary=258, experts=layers), Head(16, "shared"))
    for task in range(blocks):
        model.head.add(range(256), task if blocks > 1 else -1)
    model.eval()
    tokens = torch.randint(0, 256, (7, 7), generator=torch.Generator().manual_seed(1))
    tokens[2, 4:] = PADDING
    block = blocks - 1
    sample = Sample(block, [(part[:, :-1], part[:, 1:]) for part in tokens.split(3)], read_bytes(block, blocks))
    found = examine(model, [sample], CPU)
    logits = model(tokens[:, :-1], RouteContext()).logits.detach()[..., 256 * block : 256 * block + 256]
    y = tokens[:, 1:].flatten()
    expected = logits.flatten(0, 1)[y != PADDING].log_softmax(1), y[y != PADDING]
    close(found.model, {block: expected})
    (asked,) = found.layers.values()
    outputs = torch.stack([torch.cat(v) for v in asked.outputs.values()])
    assert outputs.shape[0] == 2
    assert outputs.any(2).all()  # no padding among them
    assert all(len(a.choices()) == len(expected[0]) for a in (*asked.alone.values(), *asked.without.values()))


def test_answers_are_calibrated_as_torchmetrics_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 6, (500,), generator=generator)
    whole, parts = Answers(), Answers()
    whole.add(0, logits.log_softmax(1), y)
    for j, rows in enumerate(torch.arange(500).split(170)):
        for some in rows.split(60):
            parts.add(j, logits[some].log_softmax(1), y[some])
    table = whole.to_dict()
    expected = multiclass_calibration_error(logits.softmax(1), y, num_classes=6, n_bins=15, norm="l1")
    assert table["ece"] == pytest.approx(float(expected), abs=1e-6)  # it computes in float32
    bins = np.array([(n * abs(a - c) if n else 0.0) for n, c, a in table["reliability"]])
    assert bins.sum() / 500 == pytest.approx(table["ece"])  # the diagram shows what the number sums up
    again = parts.to_dict()
    assert {k: again[k] for k in ("accuracy", "ece", "nll", "brier")} == pytest.approx(
        {k: table[k] for k in ("accuracy", "ece", "nll", "brier")}
    )
    assert sum(n for n, _, _ in again["reliability"]) == 500
    assert Answers().to_dict() == {}


def test_outputs_that_are_no_numbers_have_no_calibration() -> None:
    answers = Answers()
    answers.add(0, torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.int64))
    table = answers.to_dict()
    assert np.isnan([table["ece"], table["nll"], table["brier"]]).all()


@pytest.mark.parametrize(("size", "n"), [(10, 10), (10, 3), (7, 1), (5, 0), (512, 100)])
def test_evenly_apart(size: int, n: int) -> None:
    places = evenly(size, n).tolist()
    assert len(set(places)) == n
    assert places == sorted(places)
    if n:
        assert places[0] == 0
        assert places[-1] < size
        gaps = np.diff([*places, size])
        assert gaps.max() - gaps.min() <= 1
