"""Properties that every router which assigns tokens to experts has, each where it is declared.

Routers that mix tokens or merge experts have no ids: `test_unassigned.py`.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from cmoe.moe import ROUTERS, MoELayer, RouteContext

DIM, TOKENS = 8, 24
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name, router in ROUTERS.items() if router.routing_kind == "sparse"},
    "topk, noise": {"name": "topk", "noise": "gaussian", "k": 3},
    "topk, capacity": {"name": "topk", "capacity": 0.7},
    "topk, capacity by weight": {"name": "topk", "capacity": 0.7, "drop": "weight"},
    "topk, capacity at random": {"name": "topk", "capacity": 0.7, "drop": "random"},
    "topk, all losses": {"name": "topk", "importance": 0.1, "z": 0.1, "entropy": 0.1, "orthogonality": 0.1},
    "top_p, at most 2": {"name": "top_p", "p": 0.9, "most": 2},
    "task_embedding, alone": {"name": "task_embedding", "alone": True},
    "hierarchical, two groups": {"name": "hierarchical", "groups": 3, "k_groups": 2, "k": 1},
    "null_experts, many": {"name": "null_experts", "k": 4, "null": 6},
    "topk, sequences": {"name": "topk", "level": "sequence", "z": 0.1},
    "switch, sequences": {"name": "switch", "level": "sequence", "noise": "none", "capacity": 0.7},
    "recurrent, sequences": {"name": "recurrent", "level": "sequence"},
    "relu, sequences": {"name": "relu", "level": "sequence"},
    "topk, expert dropout": {"name": "topk", "expert_dropout": 0.5},
    "topk, mutual information": {"name": "topk", "mutual_information": 0.1},
    "task_embedding, alone, orthogonality": {"name": "task_embedding", "alone": True, "orthogonality": 0.1},
    "gshard, capacity": {"name": "gshard", "capacity": 0.5, "drop": "weight"},
    "dselect_k, decided": {"name": "dselect_k", "gamma": 0.05, "k": 3},
    "dselect_k, static": {"name": "dselect_k", "gate": "static"},
    "dselect_k, by task": {"name": "dselect_k", "gate": "task"},
    "stable_moe, second stage": {"name": "stable_moe", "after": 1},
    "stable_moe, by token id": {"name": "stable_moe", "distil": "token_ids"},
    "product_keys, one head": {"name": "product_keys", "heads": 1, "k": 3},
    "product_keys, two heads": {"name": "product_keys", "heads": 2, "k": 2, "norm": "none"},
}
SUMS_TO_ONE = {
    "topk", "noisy_topk", "dense", "gshard", "gaussian", "student_t", "laplace", "quadratic", "sigmoid_bias", "threshold",
    "hash", "random", "frozen_random", "attention", "recurrent", "kmeans", "task_table", "task_embedding", "per_task",
    "dselect_k",
}  # fmt: skip
AT_MOST_ONE = {
    "switch", "hierarchical", "prototypes", "cosine", "perturbed_cosine", "top_p", "null_experts", "base", "sinkhorn",
    "sparsemixer", "expert_choice", "stable_moe",
}  # fmt: skip
# the gradient is an estimate by design, or there is none to compare with
NO_TRUE_GRADIENT = {
    "threshold": "the gradient passes straight through a comparison: an estimate by definition",
    "hash": "weights are constants, nothing is learned",
    "random": "weights are constants, nothing is learned",
    "task_table": "weights are constants, nothing is learned",
}


def make(variant: str, dtype: torch.dtype = torch.float64) -> MoELayer:
    """A layer of several cohorts, in none of the simplest orders."""
    layer = MoELayer(DIM, 8, experts=4, router=dict(VARIANTS[variant]))
    layer.add_experts(3)
    layer.remove([1])
    layer.assign([0, 2, 3], 0)
    layer.assign([4, 5], 1)
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return layer.to(dtype)


def context(tokens: int = TOKENS, **more: Any) -> RouteContext:
    """Everything that any router may need."""
    return RouteContext(
        task=torch.arange(tokens) % 3,
        token_ids=torch.arange(tokens) * 7 % 11,
        sequence=torch.arange(tokens) // 5,
        generator=torch.Generator().manual_seed(0),
        **more,
    )


def route(layer: MoELayer, x: torch.Tensor, where: RouteContext | None = None) -> Any:
    return layer.router(x, where or context(len(x)), layer.view)


def inputs(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_and_weights_are_as_the_contract_says(variant: str, training: bool) -> None:
    layer = make(variant).train(training)
    routing = route(layer, inputs())
    ids, weights = routing.ids, routing.weights
    assert ids.shape == weights.shape == (TOKENS, ids.shape[1])
    assert ids.dtype == torch.int64
    assert set(ids.unique().tolist()) <= {-1, *layer.ids}
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    assert (weights[ids < 0] == 0).all()
    assert all(len(set(own)) == len(own) for row in ids.tolist() if (own := [e for e in row if e >= 0]))
    name = VARIANTS[variant]["name"]
    total, whole = weights.sum(1), not layer.router.capacity if hasattr(layer.router, "capacity") else True
    if name in SUMS_TO_ONE and whole and not (name == "gshard" and training):
        torch.testing.assert_close(total, torch.ones_like(total))
    elif name in SUMS_TO_ONE | AT_MOST_ONE and name != "expert_choice":
        assert (total <= 1 + 1e-9).all()
    if layer.router.exact_k and whole:
        assert (ids >= 0).all()
        assert ids.shape[1] == layer.router.experts_per_token(layer.view)
    assert 1 <= layer.router.experts_per_token(layer.view) <= len(layer.ids)
    assert bool(routing.aux) <= training
    assert all(loss.dim() == 0 and loss.isfinite() for loss in routing.aux.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuted_tokens_are_routed_alike(variant: str) -> None:
    layer = make(variant).eval()
    if not layer.router.permutation_equivariant:
        pytest.skip("the router declares that it is not permutation equivariant")
    x, order = inputs(), torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    where = context()
    moved = RouteContext(task=where.task[order], token_ids=where.token_ids[order], sequence=where.sequence[order])
    before, after = route(layer, x, where), route(layer, x[order], moved)
    torch.testing.assert_close(_dense(before, layer)[order], _dense(after, layer))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_causal_router_sees_no_later_token(variant: str, training: bool) -> None:
    layer = make(variant).train(training)
    if not layer.router.causal:
        pytest.skip("the router declares that it is not causal, and configurations that need it are refused")
    fresh = copy.deepcopy(layer)  # a router may learn something from a batch
    x = inputs()
    changed = torch.cat([x[:10], inputs(seed=9)[10:]])
    a = _dense(route(layer, x), layer)[:10]
    b = _dense(route(fresh, changed), fresh)[:10]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_and_none(variant: str) -> None:
    for training in (False, True):
        layer = make(variant).train(training)
        for tokens in (1, 0):
            y, routing = layer(inputs(tokens), context(tokens))
            assert y.shape == (tokens, DIM)
            total = y.sum() + sum(routing.aux.values())
            assert total.isfinite()
            if total.requires_grad:
                total.backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_goes_nowhere(variant: str) -> None:
    layer = make(variant).eval()
    x, valid = inputs(), torch.arange(TOKENS) % 4 != 1
    poisoned = x.masked_fill(~valid.unsqueeze(1), 1e3)
    a, b = (route(layer, v, context(valid=valid)) for v in (x, poisoned))
    assert (a.ids[~valid] == -1).all()
    if VARIANTS[variant]["name"] != "random":
        torch.testing.assert_close(_dense(a, layer), _dense(b, layer))
    layer.train()
    a, b = (route(copy.deepcopy(layer), v, context(valid=valid)).aux for v in (x, poisoned))
    assert a.keys() == b.keys()
    for name, loss in a.items():
        assert loss.item() == pytest.approx(b[name].item(), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_is_the_same_routing(variant: str, training: bool) -> None:
    """Those included who were chosen and left out, as their scores take part in the others' weights."""
    layer = make(variant).train(training)
    fresh = copy.deepcopy(layer)  # a router may learn something from a batch
    first = route(layer, inputs())
    again = route(fresh, inputs(), context(replay=first.replay, visible=first.columns))  # without those dropout hid
    assert torch.equal(again.ids, first.ids)
    assert (again.left is None) or torch.equal(
        again.left, -torch.ones_like(first.ids) if first.left is None else first.left
    )
    if training and VARIANTS[variant]["name"] == "sparsemixer":
        return  # where its estimate of the gradient looks is drawn, and no part of the choice
    torch.testing.assert_close(again.weights, first.weights, rtol=1e-12, atol=1e-15)
    assert again.aux.keys() == first.aux.keys()
    for name, loss in first.aux.items():
        torch.testing.assert_close(again.aux[name], loss, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_alone_are_a_replay_too(variant: str) -> None:
    layer = make(variant).eval()
    first = route(layer, inputs())
    again = route(layer, inputs(), context(replay=first.ids))
    assert torch.equal(again.ids, first.ids)
    with pytest.raises(ValueError, match="replay: expected expert ids among"):
        route(layer, inputs(), context(replay=torch.full((TOKENS, 1), 99)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_the_weights_is_that_of_their_formula(variant: str) -> None:
    """Against finite differences in float64, for the choice that was made."""
    name = VARIANTS[variant]["name"]
    if name in NO_TRUE_GRADIENT:
        pytest.skip(NO_TRUE_GRADIENT[name])
    layer = make(variant).eval()
    x = inputs(5).requires_grad_()
    ids = route(layer, x.detach(), context(5)).ids
    assert torch.autograd.gradcheck(lambda v: route(layer, v, context(5, replay=ids)).weights, (x,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_the_losses_is_that_of_their_formula(variant: str) -> None:
    """With respect to tokens and parameters, along random directions in float64, for the choice that was made."""
    layer = make(variant)
    ids = route(copy.deepcopy(layer), inputs()).ids
    parameters = {name: p.detach().requires_grad_() for name, p in layer.router.named_parameters()}

    def losses(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        again = copy.deepcopy(layer.router)  # what is learned without a gradient is learned once
        given = dict(zip(parameters, values, strict=True))
        aux = torch.func.functional_call(again, given, (x, context(replay=ids), layer.view)).aux
        return torch.stack(list(aux.values())) if aux else x.sum()

    x = inputs().requires_grad_(VARIANTS[variant]["name"] != "stable_moe")  # its small router shapes nothing but itself
    assert torch.autograd.gradcheck(losses, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_structure_and_state_come_back(variant: str) -> None:
    layer = make(variant)
    layer(inputs(), context())  # what is learned without a gradient is part of it
    layer.freeze([4])
    layer.eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = MoELayer(DIM, 8, experts=4, router=dict(VARIANTS[variant])).double()
    other.restore_structure(layer.structure())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    other.eval()
    a, b = (one(inputs(), context()) for one in (layer, other))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1].ids, b[1].ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_frozen_stays(variant: str) -> None:
    layer = make(variant)
    layer.freeze([0, 5])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = _frozen(layer)
    assert before
    for seed in range(3):
        optimizer.zero_grad()
        y, routing = layer(inputs(seed=seed), context())
        total = y.square().sum() + sum(routing.aux.values())
        total.backward()
        optimizer.step()
    for name, value in _frozen(layer).items():
        assert torch.equal(before[name], value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_added_expert_leaves_old_tasks_alone(variant: str) -> None:
    layer = make(variant).eval()
    if not layer.router.isolatable:
        pytest.skip("the router declares that it is not isolatable")
    where = RouteContext(
        task=0, token_ids=context().token_ids, visible=(0, 2, 3), generator=torch.Generator().manual_seed(0)
    )
    before, _ = layer(inputs(), where)
    layer.add_experts(2, tasks=[2])
    layer.eval()
    where = RouteContext(
        task=0, token_ids=context().token_ids, visible=(0, 2, 3), generator=torch.Generator().manual_seed(0)
    )
    after, _ = layer(inputs(), where)
    assert torch.equal(before, after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_routes_in_float32(variant: str) -> None:
    layer = make(variant, torch.float32)
    x = inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x, context())
    assert routing.weights.dtype == torch.float32
    assert y.isfinite().all()


def _dense(routing: Any, layer: MoELayer) -> torch.Tensor:
    """Weights as a matrix of tokens and experts: what a routing says, however it is written down."""
    out = routing.weights.new_zeros(len(routing.ids), max(layer.ids) + 2)
    return out.scatter_add(1, routing.ids + 1, routing.weights)[:, 1:]


def _frozen(layer: MoELayer) -> dict[str, torch.Tensor]:
    """Weights and router columns of the frozen cohorts, what is learned of them without a gradient included."""
    return {
        f"{key} {type(module).__name__} {name}": p.detach().clone()
        for modules in layer.stacked_modules()
        for key, module in modules.items()
        if key in layer.frozen_keys
        for name, p in (*module.named_parameters(), *module.named_buffers())
    }


def test_centroids_follow_the_tokens_and_not_their_jittered_copies() -> None:
    layer = MoELayer(DIM, 8, experts=1, router={"name": "kmeans", "rate": 0.5, "noise": "jitter"}).double()
    centre = layer.router.columns["0"].centre
    before = centre.clone()
    route(layer, inputs())
    torch.testing.assert_close(centre, 0.5 * before + 0.5 * inputs().mean(0, keepdim=True))
