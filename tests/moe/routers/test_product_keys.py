"""Product keys against brute force over all n² keys, and cohorts whose keys cannot be divided."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmoe.moe import MoELayer, RouteContext
from cmoe.moe.optimizer import migrate_optimizer
from cmoe.moe.routers import product_keys
from cmoe.moe.routers.product_keys import Grid, best_pairs, joined, shape_for
from cmoe.moe.routing import Routing

DIM, TOKENS = 6, 40


def make(experts: int = 16, more: tuple[int, ...] = (), **options: Any) -> MoELayer:
    torch.manual_seed(1)
    router = {"name": "product_keys", "k": 3, "heads": 4, **options}
    layer = MoELayer(DIM, 1, experts=experts, expert={"name": "ffn", "bias": False}, router=router)
    for n in more:
        layer.add_experts(n)
    return layer.double().eval()


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def route(layer: MoELayer, x: Tensor, **context: Any) -> Routing:
    return layer.router(x, RouteContext(**context), layer.view)


def brute_force(layer: MoELayer, x: Tensor, visible: set[int] | None = None) -> np.ndarray:
    """(T, ids) weights: every head's product with every expert's whole key, the best k of them, their softmax, summed."""
    router, size = layer.router, layer.router.size
    out = np.zeros((len(x), max(layer.ids) + 1))
    queries = (x.numpy() @ router.query.weight.detach().numpy().T).reshape(len(x), router.heads, 2, size)
    if router.norm == "layer":
        mean, var = queries.mean(-1, keepdims=True), queries.var(-1, keepdims=True)
        queries = (queries - mean) / np.sqrt(var + 1e-5)
    keys = {}
    for key, ids in layer.cohort_ids.items():
        first, second = (p.detach().numpy() for p in (router.columns[key].first, router.columns[key].second))
        for row, expert in enumerate(ids):
            place = int(router.columns[key].place[row])
            keys[expert] = np.concatenate([first[place // len(second)], second[place % len(second)]])
    experts = sorted(set(keys) if visible is None else visible)
    matrix = np.stack([keys[e] for e in experts])
    for t in range(len(x)):
        for head in range(router.heads):
            scores = matrix @ queries[t, head].reshape(-1)
            best = np.argsort(-scores)[: router.k]
            e = np.exp(scores[best] - scores[best].max())
            for b, w in zip(best, e / e.sum(), strict=True):
                out[t, experts[b]] += w
    return out


def dense(routing: Routing, layer: MoELayer) -> Tensor:
    out = torch.zeros(len(routing.ids), max(layer.ids) + 2, dtype=torch.float64)
    return out.scatter_add(1, routing.ids + 1, routing.weights)[:, 1:].detach()


def check(layer: MoELayer, visible: set[int] | None = None) -> None:
    x = inputs()
    routing = route(layer, x, visible=None if visible is None else tuple(visible))
    np.testing.assert_allclose(dense(routing, layer), brute_force(layer, x, visible), atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("experts", [1, 2, 3, 7, 12, 16, 49, 81, 96])
def test_the_best_of_all_keys_are_found(experts: int, norm: str, heads: int) -> None:
    check(make(experts, heads=heads, norm=norm, k=5))


@pytest.mark.parametrize("k", [1, 2, 30, 64, 100])
def test_for_any_number_of_experts(k: int) -> None:
    check(make(64, k=k))


def test_over_several_cohorts() -> None:
    check(make(16, more=(9, 5, 1, 30)))


def test_among_those_that_may_be_seen() -> None:
    layer = make(16, more=(9,))
    for visible in ({0, 1, 2}, set(range(16)), {5, 7, 11, 17, 24}, {3}):
        check(layer, visible)


def test_after_removals_and_splits() -> None:
    layer = make(25, more=(16,))
    layer.remove([0, 7, 8, 30])
    check(layer)
    layer.freeze([3, 4, 5, 31])
    check(layer)
    layer.freeze([4, 20])
    layer.thaw([5])
    layer.remove([24, 40])
    layer.add_experts(4)
    check(layer.double())
    check(layer, set(layer.ids) - {1, 2, 33})


@pytest.mark.parametrize("at_once", [1, 50, 2**24])
@pytest.mark.parametrize("holes", [0, 3, 60])
def test_pairs_are_exact_whatever_is_missing(at_once: int, holes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_keys, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (8, 9))
    places = torch.randperm(72, generator=generator)[holes:]
    sums = (first.unsqueeze(2) + second.unsqueeze(1)).flatten(1)
    missing = torch.ones(72, dtype=torch.bool).index_fill(0, places, False)
    for k in (1, 5, 12):
        values, found = best_pairs(first, second, k, places if holes else None)
        expected = sums.masked_fill(missing, -torch.inf).topk(k)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(found, expected.indices)


@pytest.mark.parametrize("n", [*range(1, 60), 10_000, 65_536, 1_000_003])
def test_grids_hold_everybody_and_are_nearly_square(n: int) -> None:
    rows, across = shape_for(n)
    assert rows * across >= n
    assert rows * across - n < across
    assert across <= 4 * rows
    if n in (4, 12, 16, 20, 30, 10_000, 65_536):
        assert rows * across == n


def test_the_same_expert_of_two_heads_is_there_once() -> None:
    columns = torch.tensor([[5, 2, 5, 0], [1, 1, 1, 1], [3, 2, 1, 0]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    once, total = joined(columns, weights)
    assert once.tolist() == [[0, 2, 5, -1], [1, -1, -1, -1], [0, 1, 2, 3]]
    torch.testing.assert_close(total, torch.tensor([[0.4, 0.2, 0.4, 0], [1, 0, 0, 0], [0.4, 0.3, 0.2, 0.1]]))


@pytest.mark.parametrize("pattern", ["whole", "holes", "cohorts"])
def test_the_gradient_is_that_of_the_formula(pattern: str) -> None:
    """Of tokens, queries and sub-keys against finite differences."""
    layer = make(9, more=(4,) if pattern == "cohorts" else ())
    if pattern == "holes":
        layer.remove([2, 6])
    names = [name for name, _ in layer.router.named_parameters()]

    def weights(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(layer.router, given, (x, RouteContext(), layer.view))
        return routing.weights

    values = [p.detach().requires_grad_() for p in layer.router.parameters()]
    assert torch.autograd.gradcheck(weights, (inputs(4).requires_grad_(), *values))


def test_a_part_of_a_cohort_takes_the_keys_along() -> None:
    """Both parts learn on from where they were, optimizer state included, and the frozen one stays."""
    layer = make(16)
    layer.train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    x = inputs()

    def train() -> None:
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()

    train()
    whole = layer.router.columns["0"]
    before, moment = route(layer, x), optimizer.state[whole.first]["exp_avg"].clone()
    migrate_optimizer(optimizer, layer.freeze([3, 9]))
    after = route(layer, x)
    np.testing.assert_allclose(dense(after, layer), dense(before, layer), atol=1e-12)
    rest, part = (layer.router.columns[key] for key in layer.cohort_ids)
    assert [len(own.place) for own in (rest, part)] == [14, 2]
    assert part.place.tolist() == [3, 9]
    for own in (rest, part):
        assert torch.equal(own.first, whole.first)
        assert torch.equal(optimizer.state[own.first]["exp_avg"], moment)
    frozen = part.first.detach().clone()
    train()
    assert torch.equal(part.first, frozen)
    assert not torch.equal(rest.first, frozen)


def test_a_divided_cohort_comes_back_from_a_file() -> None:
    layer = make(16, more=(7,))
    layer.freeze([3, 9])
    layer.remove([0, 1, 20])
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(16)
    other.restore_structure(layer.structure())
    other.double().load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(route(layer, inputs()).ids, route(other, inputs()).ids)
    assert torch.equal(route(layer, inputs()).weights, route(other, inputs()).weights)
    check(other)
    # and back: a model whose cohort was divided takes the state of one that was not
    grid = Grid(12, 3)
    divided = layer.router.columns["0"]
    divided.load_state_dict(grid.state_dict())
    assert divided.first.shape == grid.first.shape
    assert divided.whole


def test_a_file_of_other_sub_keys_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for first"):
        Grid(4, 3).load_state_dict(Grid(4, 5).state_dict())


def test_merged_and_pruned_experts_keep_keys() -> None:
    layer = make(9)
    new, _ = layer.merge([2, 5])
    check(layer)
    assert new in layer.ids


def test_copies_are_independent() -> None:
    layer = make(9)
    other = copy.deepcopy(layer)
    other.remove([0])
    check(layer)
    check(other)


def test_halves_of_one_dimension_cannot_be_normed() -> None:
    with pytest.raises(ValueError, match="rank: expected at least 2"):
        make(4, rank=1)
    check(make(4, rank=1, norm="none"))
    with pytest.raises(ValueError, match="product_keys: norm: expected"):
        make(4, norm="batch")
