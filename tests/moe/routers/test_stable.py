"""StableMoE: two stages, when each begins, and what the second leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmoe.moe import MoELayer, RouteContext
from cmoe.moe.routers.stable import StableMoE, balance_loss
from cmoe.moe.routing import Routing

DIM, TOKENS, EXPERTS = 6, 60, 4


def make(**options: Any) -> MoELayer:
    torch.manual_seed(1)
    layer = MoELayer(DIM, 4, experts=EXPERTS, router={"name": "stable_moe", "after": 3, **options}).double()
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return layer


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def route(layer: MoELayer, x: Tensor, **context: Any) -> Routing:
    return layer.router(x, RouteContext(**context), layer.view)


def scores(layer: MoELayer, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of the learned and of the small router."""
    own = layer.router.columns["0"]
    weight, light = own.weight.detach().numpy(), own.light.detach().numpy()
    return x.numpy() @ weight.T, x.numpy() @ layer.router.light.weight.detach().numpy().T @ light.T


def sigmoid(s: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-s))


def test_the_stages_choose_by_their_own_scores_and_weigh_alike() -> None:
    layer, x = make().train(), inputs()
    learned, light = scores(layer, x)
    assert (learned.argmax(1) != light.argmax(1)).any()
    for batch in range(5):
        routing = route(layer, x)
        chosen = (learned if batch < 3 else light).argmax(1)
        np.testing.assert_array_equal(routing.ids[:, 0], chosen)
        np.testing.assert_allclose(routing.weights[:, 0].detach(), sigmoid(learned[np.arange(TOKENS), chosen]))
        assert set(routing.aux) == ({"balance", "router_distillation"} if batch < 3 else set())
    assert layer.router.columns["0"].age.tolist() == [5] * EXPERTS


def test_the_losses_of_the_first_stage() -> None:
    layer, x = make(balance=0.5, distillation=2.0).train(), inputs()
    learned, light = scores(layer, x)
    valid = np.arange(TOKENS) % 4 != 1
    aux = route(layer, x, valid=torch.from_numpy(valid)).aux
    chosen = learned.argmax(1)
    count = np.bincount(chosen[valid], minlength=EXPERTS)
    mean = count.mean()
    total = sum((count[e] - mean) / mean * sigmoid(learned[valid & (chosen == e), e]).sum() for e in range(EXPERTS))
    assert aux["balance"].item() == pytest.approx(0.5 * total / valid.sum())
    log_probs = light - np.log(np.exp(light).sum(1, keepdims=True))
    expected = -log_probs[np.arange(TOKENS), chosen][valid].mean()
    assert aux["router_distillation"].item() == pytest.approx(2.0 * expected)


def test_the_small_router_shapes_nothing_but_itself() -> None:
    layer, x = make(balance=0.0).train(), inputs().requires_grad_()
    route(layer, x).aux["router_distillation"].backward()
    own = layer.router.columns["0"]
    assert x.grad is None
    assert own.weight.grad is None
    assert own.light.grad.abs().sum() > 0
    assert layer.router.light.weight.grad.abs().sum() > 0


def test_the_second_stage_leaves_the_small_router_as_it_is() -> None:
    layer, x = make().train(), inputs()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.5)

    def train() -> None:
        optimizer.zero_grad()
        y, routing = layer(x)
        (y.square().mean() + sum(routing.aux.values())).backward()
        optimizer.step()

    own = layer.router.columns["0"]
    for _ in range(3):
        train()
    light, projection, learned = (p.detach().clone() for p in (own.light, layer.router.light.weight, own.weight))
    chosen = route(layer.eval(), x).ids
    layer.train()
    for _ in range(5):
        train()
    assert torch.equal(own.light, light)
    assert torch.equal(layer.router.light.weight, projection)
    assert not torch.equal(own.weight, learned)  # still weighs the outputs
    assert torch.equal(route(layer.eval(), x).ids, chosen)


def test_distillation_teaches_the_small_router_what_the_learned_one_does() -> None:
    layer, x = make(after=400).train(), inputs()
    optimizer = torch.optim.Adam([layer.router.columns["0"].light, *layer.router.light.parameters()], lr=0.02)
    before = float((route(layer, x).ids == route(layer, x, stage=1).ids).double().mean())
    for _ in range(300):
        optimizer.zero_grad()
        route(layer, x).aux["router_distillation"].backward()
        optimizer.step()
    after = float((route(layer, x).ids == route(layer, x, stage=1).ids).double().mean())
    assert before < 0.5
    assert after > 0.9


def test_the_context_can_say_the_stage() -> None:
    layer, x = make().eval(), inputs()
    learned, light = scores(layer, x)
    np.testing.assert_array_equal(route(layer, x).ids[:, 0], learned.argmax(1))
    np.testing.assert_array_equal(route(layer, x, stage=1).ids[:, 0], light.argmax(1))


def test_evaluation_counts_for_nothing() -> None:
    layer, x = make().eval(), inputs()
    for _ in range(5):
        route(layer, x)
    assert layer.router.columns["0"].age.tolist() == [0] * EXPERTS


def test_added_experts_bring_the_first_stage_back_for_those_who_see_them() -> None:
    layer, x = make(), inputs()
    for _ in range(3):
        route(layer, x)
    old = route(layer, x, training=False).ids
    layer.add_experts(1)
    layer.double()
    assert "balance" in route(layer, x).aux
    assert layer.router.columns["1"].age.tolist() == [1]
    assert torch.equal(route(layer, x, visible=tuple(range(EXPERTS)), training=False).ids, old)
    for _ in range(2):
        route(layer, x)
    assert route(layer, x).aux == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_saved_and_exact_in_every_precision(dtype: torch.dtype) -> None:
    layer = make(after=400).to(dtype).train()
    for _ in range(300):  # bfloat16 cannot count beyond 256
        route(layer, inputs().to(dtype)[:2])
    other = make(after=400).to(dtype)
    other.load_state_dict(layer.state_dict())
    assert other.router.columns["0"].age.tolist() == [300] * EXPERTS
    layer.freeze([2])  # a split takes it along
    assert {tuple(own.age.tolist()) for own in layer.router.columns.values()} == {(300,) * 3, (300,)}


def test_token_ids_alone_decide_in_the_second_stage() -> None:
    layer = make(distil="token_ids", vocabulary=11).eval()
    ids = torch.arange(TOKENS) * 7 % 11
    first, second = (route(layer, inputs(seed), token_ids=ids, stage=1).ids[:, 0] for seed in (2, 3))
    assert torch.equal(first, second)
    table = layer.router.light.weight.detach() @ layer.router.columns["0"].light.detach().T
    assert torch.equal(first, table.argmax(1)[ids])
    assert len(first.unique()) > 1
    with pytest.raises(ValueError, match="vocabulary: expected more than 11, got 11"):
        route(layer, inputs(), token_ids=ids + 1, stage=1)
    with pytest.raises(ValueError, match="expected token ids"):
        route(layer, inputs(), stage=1)
    assert layer.router.needs == {"token_ids"}
    assert make().router.needs == frozenset()


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="distil: expected"):
        StableMoE(DIM, distil="words")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="level: expected 'token'"):
        StableMoE(DIM, distil="token_ids", level="sequence")


def test_a_balanced_load_has_no_balance_loss() -> None:
    scores = torch.randn(8, 4, dtype=torch.float64)
    column = torch.arange(8) % 4
    assert balance_loss(scores, column, None).item() == pytest.approx(0)
    assert balance_loss(scores.abs(), column.clamp(max=1), None).item() > 0
