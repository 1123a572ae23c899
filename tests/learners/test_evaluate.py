"""Predictions against brute force over all outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cmoe.backbones import MLP, ByteLM, ExpertLayers
from cmoe.learners import Head, Model
from cmoe.learners.evaluate import Outputs, classify, model_language
from cmoe.learners.objective import PADDING
from cmoe.moe import RouteContext
from cmoe.moe.routers import TaskTable, TopK

from .helpers import model

CPU = torch.device("cpu")
HEADS = {
    "shared": ("shared", [(list(range(8)), -1)]),
    "growing": ("growing", [([7, 2], -1), ([5, 0], -1)]),
    "multi": ("multi", [([7, 2], 0), ([5, 0], 1), ([2, 7], 2)]),
}
SEEN, CLASSES, TASK = [7, 2, 5], [5, 0], 1


def data(n: int = 23) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)) * 4
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(10)]


def brute(logits: np.ndarray, units: list[tuple[int, int]], allowed: list[int]) -> tuple[list[int], list[float]]:
    pred, confidence = [], []
    for row in logits:
        shares = {u: math.exp(row[u] - max(row)) for u in allowed}
        best = max(shares, key=lambda u: shares[u])
        pred.append(units[best][0])
        confidence.append(shares[best] / sum(shares.values()))
    return pred, confidence


@pytest.mark.parametrize("which", HEADS)
@pytest.mark.parametrize("free", ["all", "seen"])
def test_predictions_are_brute_force(which: str, free: str) -> None:
    made = model(*HEADS[which]).eval()
    head = made.head
    outputs = Outputs(head.columns(SEEN) if free == "seen" else None, head.columns(CLASSES, TASK))
    found = classify(made, data(), TASK, outputs, None, CPU).arrays
    x = torch.cat([x for x, _ in data()])
    logits = made(x, RouteContext()).logits.detach().double().numpy()
    units = head.units
    every = [u for u, (c, _) in enumerate(units) if free == "all" or c in SEEN]
    own = [u for u, (c, t) in enumerate(units) if c in CLASSES and t in (-1, TASK)]
    for prefix, allowed in (("", every), ("task_", own)):
        pred, confidence = brute(logits, units, allowed)
        assert found[f"{prefix}pred"].tolist() == pred
        np.testing.assert_allclose(found[f"{prefix}confidence"], confidence, rtol=1e-5)
    assert set(found["task_pred"]) <= set(CLASSES)
    assert len(set(found["pred"])) > 1


@pytest.mark.parametrize(
    ("free", "task", "arrays"),
    [(True, False, {"pred", "confidence"}), (False, True, {"task_pred", "task_confidence"}), (False, False, set())],
)
def test_what_is_not_reported_is_not_there(free: bool, task: bool, arrays: set[str]) -> None:
    made = model(*HEADS["shared"]).eval()
    assert set(classify(made, data(), 0, Outputs(None, None, free, task), None, CPU).arrays) == arrays


def test_nothing_to_choose_from_is_no_prediction() -> None:
    made = model(*HEADS["growing"]).eval()
    outputs = Outputs(made.head.columns([]), made.head.columns([3, 1]))
    assert classify(made, data(), 0, outputs, None, CPU).arrays == {}


def test_an_own_rule_predicts_and_may_need_the_label() -> None:
    made = model(*HEADS["shared"]).eval()

    def rule(x: Tensor, task: int | None) -> Tensor | None:
        return None if task is None else torch.eye(8)[torch.full((len(x),), task + 3)]

    found = classify(made, data(), 2, Outputs(None, None), rule, CPU).arrays
    assert set(found) == {"task_pred", "task_confidence"}
    assert set(found["task_pred"]) == {5}


def sparse(router: type, **options: object) -> Model:
    torch.manual_seed(0)
    experts = ExpertLayers(3, lambda dim: router(dim, **options))
    made = Model(MLP(hidden=[6], input_shape=(4,), experts=experts), Head(6, "shared"))
    made.head.add(range(4))
    return made.eval()


def test_a_router_that_needs_the_label_gives_no_free_prediction() -> None:
    made = sparse(TaskTable)
    found = classify(made, data(), 2, Outputs(None, None), None, CPU)
    assert set(found.arrays) == {"task_pred", "task_confidence"}
    assert found.traffic.load == {"layers.0": {2: 23}}
    x = torch.cat([x for x, _ in data()])
    expected = made(x, RouteContext(task=2)).logits.argmax(1)
    assert found.arrays["task_pred"].tolist() == expected.tolist()


def test_load_counts_every_token_k_times() -> None:
    made = sparse(TopK, k=2, init_std=1.0)
    load = classify(made, data(), 0, Outputs(None, None), None, CPU).traffic.load["layers.0"]
    x = torch.cat([x for x, _ in data()])
    ids = made(x, RouteContext()).routings["layers.0"].ids
    assert load == {e: int((ids == e).sum()) for e in sorted(load)}
    assert sum(load.values()) == 2 * 23


def decoder(blocks: int) -> Model:
    torch.manual_seed(0)
    made = Model(ByteLM(1, 16, 2, input_shape=(6,), vocabulary=258), Head(16, "multi" if blocks > 1 else "shared"))
    for task in range(blocks):
        made.head.add(range(256), task if blocks > 1 else -1)
    for p in made.parameters():
        p.data.mul_(3)
    return made.eval()


@pytest.mark.parametrize(("blocks", "task"), [(1, 0), (1, 2), (3, 0), (3, 2), (3, 7)])
def test_language_rows_are_sums_over_bytes(blocks: int, task: int) -> None:
    made = decoder(blocks)
    tokens = torch.randint(0, 256, (7, 7), generator=torch.Generator().manual_seed(1))
    tokens[2, 4:] = PADDING
    batches = [(part[:, :-1], part[:, 1:]) for part in tokens.split(3)]
    found = model_language(made, batches, task, None, CPU).arrays
    logits = made(tokens[:, :-1], RouteContext()).logits.detach().double()
    block = task if task < blocks else 0  # a task without outputs of its own uses the first block
    logits = logits[..., 256 * block : 256 * block + 256]
    for i in range(7):
        nll, correct, count = 0.0, 0, 0
        for j in range(6):
            byte = int(tokens[i, j + 1])
            if byte != PADDING:
                nll -= float(torch.log_softmax(logits[i, j], 0)[byte])
                correct += int(logits[i, j].argmax() == byte)
                count += 1
        assert found["nll"][i] == pytest.approx(nll, rel=1e-4)
        assert (found["correct"][i], found["tokens"][i]) == (correct, count)
    assert found["tokens"].sum() == 6 * 7 - 3


def test_bits_per_byte_of_a_row() -> None:
    """Through the record and the metric: nats summed over all bytes, divided by ln 2 and their number."""
    from cmoe.metrics import Column, Record, compute

    made = decoder(1)
    tokens = torch.randint(0, 256, (5, 7), generator=torch.Generator().manual_seed(1))
    tokens[0, 3:] = PADDING
    found = model_language(made, [(tokens[:, :-1], tokens[:, 1:])], 0, None, CPU).arrays
    record = Record("language", ["a"], [()], [(tokens[:, 1:] != PADDING).sum(1).numpy()])
    record.add_row(0, {0: Column(**found)})
    value = compute(record)["bits_per_byte/bpb_macro"].value
    logp = torch.log_softmax(made(tokens[:, :-1], RouteContext()).logits.detach().double(), -1)
    y = tokens[:, 1:]
    picked = [-float(logp[i, j, y[i, j]]) for i in range(5) for j in range(6) if y[i, j] != PADDING]
    assert value == pytest.approx(sum(picked) / len(picked) / math.log(2), rel=1e-5)
