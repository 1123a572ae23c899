"""Routers that assign tokens to no expert: slots that mix tokens (soft), experts that are merged (merge)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.moe import ROUTERS, MoELayer, RouteContext
from cmoe.moe.routing import MergeRouting, Routing, SoftRouting

DIM, HIDDEN, GROUPS, LENGTH = 6, 5, 4, 7
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name, router in ROUTERS.items() if router.routing_kind != "sparse"},
    "soft, three slots": {"name": "soft", "slots": 3},
    "smear, as it is": {"name": "smear", "norm": "none", "expert_dropout": 0.0},
}
# sequences of 1 to 9 tokens, mixed up
PACKED = torch.tensor([5, 2, 2, 5, 0, 5, 2, 5, 5, 9, 5, 5, 2, 5, 5, 2, 9, 9])


def make(variant: str, dtype: torch.dtype = torch.float64, **options: Any) -> MoELayer:
    """A layer of several cohorts, in none of the simplest orders."""
    torch.manual_seed(1)
    layer = MoELayer(DIM, HIDDEN, experts=3, router={**VARIANTS[variant], **options})
    layer.add_experts(3)
    layer.remove([1])
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.7 * torch.randn(p.shape))
    return layer.to(dtype).eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (GROUPS, LENGTH)), DIM, generator=generator, dtype=torch.float64)


def shares(routing: Routing) -> list[Tensor]:
    """What must sum to 1 along its last dimension, padding left out."""
    if isinstance(routing, MergeRouting):
        return [routing.weights_GE]
    assert isinstance(routing, SoftRouting)
    into, back = routing.dispatch_GLS, routing.combine_GLS
    real_GL = (back.sum(2) > 0).flatten()
    return [into.transpose(1, 2)[into.sum((1, 2)) > 0], back.flatten(0, 1)[real_GL]]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_a_mean(variant: str, training: bool) -> None:
    """Slots are means of tokens, outputs means of slots, merged experts means of experts: weights of sum 1, none below 0."""
    layer = make(variant).train(training)
    y, routing = layer(inputs())
    assert y.shape == (GROUPS, LENGTH, DIM)
    assert routing.ids.shape == (GROUPS * LENGTH, 0)
    assert routing.kind == layer.router.routing_kind
    assert routing.columns == layer.ids
    assert routing.aux == {}
    for part in shares(routing):
        assert part.dtype == torch.float64
        assert (part >= 0).all()
        torch.testing.assert_close(part.sum(-1), torch.ones_like(part[..., 0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuted_tokens_of_a_sequence_come_out_permuted(variant: str) -> None:
    layer, x = make(variant), inputs()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x[:, order])[0], layer(x)[0][:, order])


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_know_nothing_of_each_other(variant: str) -> None:
    layer, x = make(variant), inputs()
    changed = x.clone()
    changed[2] = inputs(seed=9)[2]
    before, after = layer(x)[0], layer(changed)[0]
    torch.testing.assert_close(before[[0, 1, 3]], after[[0, 1, 3]], rtol=0, atol=0)
    assert (before[2] - after[2]).abs().max() > 1e-3
    alone = torch.cat([layer(x[i : i + 1])[0] for i in range(GROUPS)])
    torch.testing.assert_close(before, alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tokens_of_a_sequence_see_each_other(variant: str) -> None:
    """Which is why these routers declare that they are not causal."""
    layer, x = make(variant), inputs()
    assert not layer.router.causal
    changed = x.clone()
    changed[:, -1] = inputs(seed=9)[:, -1]
    assert (layer(x)[0] - layer(changed)[0])[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_are_as_each_alone(variant: str) -> None:
    layer, x = make(variant), inputs(len(PACKED))
    y, routing = layer(x, RouteContext(sequence=PACKED))
    for part in shares(routing):
        torch.testing.assert_close(part.sum(-1), torch.ones_like(part[..., 0]))
    for sequence in PACKED.unique():
        own = sequence == PACKED
        torch.testing.assert_close(y[own], layer(x[own].unsqueeze(0))[0].squeeze(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_sequences_of_their_own(variant: str) -> None:
    layer, x = make(variant), inputs(9)
    y, _ = layer(x)
    torch.testing.assert_close(y, layer(x.unsqueeze(1))[0].squeeze(1))
    torch.testing.assert_close(y[3:4], layer(x[3:4])[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_as_if_it_were_not_there(variant: str, packed: bool) -> None:
    """Whatever it holds, gradients included; a sequence of padding alone gives zeros."""
    layer = make(variant)
    lengths = [LENGTH, 3, 1, 0]
    valid = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    x = inputs().masked_fill(~valid.unsqueeze(2), torch.inf).requires_grad_()
    if packed:
        order = torch.randperm(GROUPS * LENGTH, generator=torch.Generator().manual_seed(5))
        sequence = torch.arange(GROUPS).repeat_interleave(LENGTH)[order]
        mixed, _ = layer(x.flatten(0, 1)[order], RouteContext(valid=valid.flatten()[order], sequence=sequence))
        y = torch.empty_like(mixed).index_copy(0, order, mixed).view_as(x)
    else:
        y, _ = layer(x, RouteContext(valid=valid))
    assert (y[~valid] == 0).all()
    for i, length in enumerate(lengths):
        if length:
            torch.testing.assert_close(y[i, :length], layer(x[i : i + 1, :length])[0].squeeze(0))
    y.square().sum().backward()
    assert x.grad is not None
    assert (x.grad[~valid] == 0).all()
    assert x.grad[valid].abs().min() > 0
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_formula(variant: str, packed: bool) -> None:
    """Of tokens and all parameters against finite differences."""
    layer = make(variant)
    names = [name for name, _ in layer.named_parameters()]
    x = inputs(8) if packed else inputs(2, 4)
    context = RouteContext(sequence=PACKED[:8]) if packed else None

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, context))[0]

    values = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_and_none(variant: str) -> None:
    for training in (False, True):
        layer = make(variant).train(training)
        for shape in ((1, 1), (0, 3), (2, 0), (1,), (0,)):
            y, _ = layer(inputs(*shape))
            assert y.shape == (*shape, DIM)
            y.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_frozen_stays(variant: str) -> None:
    layer = make(variant).train()
    layer.freeze([0, 5])
    frozen = {
        (key, name): (p, p.detach().clone())
        for modules in layer.stacked_modules()
        for key, module in modules.items()
        if key in layer.frozen_keys
        for name, p in module.named_parameters()
    }
    assert len(frozen) == 10
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        layer(inputs(seed=seed))[0].square().sum().backward()
        optimizer.step()
    for name, (p, before) in frozen.items():
        assert torch.equal(p, before), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_added_expert_leaves_those_alone_who_do_not_see_it(variant: str) -> None:
    layer = make(variant)
    assert layer.router.isolatable
    before, _ = layer(inputs(), RouteContext(visible=(0, 2, 4)))
    everyone = layer(inputs())[0]
    layer.add_experts(2)
    layer.double().eval()
    after, routing = layer(inputs(), RouteContext(visible=(0, 2, 4)))
    assert torch.equal(before, after)
    assert routing.columns == (0, 2, 4)
    assert (layer(inputs())[0] - everyone).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_visible_takes_no_part(variant: str) -> None:
    layer = make(variant)
    y, _ = layer(inputs(), RouteContext(visible=(0, 2, 4)))
    layer.remove([3, 5])
    torch.testing.assert_close(layer(inputs())[0], y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_structure_and_state_come_back(variant: str) -> None:
    layer = make(variant)
    layer.freeze([4])
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = MoELayer(DIM, HIDDEN, experts=3, router=dict(VARIANTS[variant])).double()
    other.restore_structure(layer.structure())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(layer(inputs())[0], other.eval()(inputs())[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_splitting_a_cohort_changes_nothing(variant: str) -> None:
    layer = make(variant)
    before, _ = layer(inputs())
    layer.freeze([4])
    torch.testing.assert_close(layer(inputs())[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_weighs_in_float32(variant: str, dtype: torch.dtype) -> None:
    layer = make(variant, dtype)
    y, routing = layer(inputs().to(dtype))
    assert y.dtype == dtype
    assert all(part.dtype == torch.float32 for part in shares(routing))
    exact, _ = layer.double()(inputs().to(dtype).double())
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = make(variant, torch.float32)(inputs().float())
    assert all(part.dtype == torch.float32 for part in shares(routing))
    assert y.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_is_nothing_to_replay(variant: str) -> None:
    with pytest.raises(ValueError, match=f"{VARIANTS[variant]['name']}: replay: expected none"):
        make(variant)(inputs(3), RouteContext(replay=torch.zeros(3, 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="distillation: expected 0"):
        MoELayer(DIM, HIDDEN, router=dict(VARIANTS[variant]), distillation=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_computing_again_changes_no_gradient(variant: str) -> None:
    layer = make(variant)
    again = copy.deepcopy(layer)
    again.recompute = True
    for one in (layer, again):
        one(inputs())[0].square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_feature_map_is_one_sequence() -> None:
    layer = make("soft")
    y, routing = layer(inputs(2, 3, 4))
    assert isinstance(routing, SoftRouting)
    assert routing.dispatch_GLS.shape[:2] == (2, 12)
    torch.testing.assert_close(y, layer(inputs(2, 3, 4).flatten(1, 2))[0].view_as(y))


def test_merging_needs_experts_of_one_size() -> None:
    layer = MoELayer(DIM, HIDDEN, experts=2, router="smear", more=[{"hidden": 3}])
    with pytest.raises(ValueError, match="one kind and size"):
        layer(torch.zeros(2, 3, DIM))


def test_dropped_experts_take_no_part_in_a_merge() -> None:
    """Each sequence loses its own, about as many as said, never all, and as the generator draws."""
    layer = make("smear", expert_dropout=0.6).train()
    x = inputs(400, 3)

    def weights(seed: int) -> Tensor:
        _, routing = layer(x, RouteContext(generator=torch.Generator().manual_seed(seed)))
        assert isinstance(routing, MergeRouting)
        return routing.weights_GE

    first = weights(0)
    share = (first == 0).double().mean().item()
    # 5 experts: all are left out in 0.6^5 of the draws, and then one stays
    assert share == pytest.approx(0.6 - 0.6**5 / 5, abs=0.02)
    assert (first > 0).any(1).all()
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    _, whole = layer.eval()(x)
    kept = torch.where(first > 0, whole.weights_GE, 0.0)
    torch.testing.assert_close(first, kept / kept.sum(1, keepdim=True))
