"""Options that every router by score has: the level of a sequence, expert dropout, mutual information, precision."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.moe import MoELayer, RouteContext, losses
from cmoe.moe.routers import ROUTERS, Scored
from cmoe.moe.routers.parts.dropout import kept
from cmoe.moe.routers.parts.groups import Groups
from cmoe.moe.routing import Routing

DIM, GROUPS, LENGTH, EXPERTS = 6, 5, 4, 5
SCORED = [name for name, router in ROUTERS.items() if issubclass(router, Scored)]
BY_SEQUENCE = [name for name in SCORED if name not in ("hash", "random")] + ["product_keys"]


def make(router: str, **options: Any) -> MoELayer:
    torch.manual_seed(1)
    layer = MoELayer(DIM, 4, experts=EXPERTS, router={"name": router, **options}).double().eval()
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.6 * torch.randn(p.shape))
    return layer


def inputs(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (GROUPS, LENGTH)), DIM, generator=generator, dtype=torch.float64)


def dense(routing: Routing) -> Tensor:
    out = routing.weights.new_zeros(len(routing.ids), EXPERTS + 1)
    return out.scatter_add(1, routing.ids + 1, routing.weights)[:, 1:].detach()


# -- level: sequence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", BY_SEQUENCE)
def test_a_sequence_is_routed_as_its_mean(router: str) -> None:
    """As a router by token routes the mean tokens; every token of a sequence alike."""
    by_sequence, by_token = make(router, level="sequence"), make(router)
    by_sequence.load_state_dict(by_token.state_dict())
    x, task = inputs(), torch.arange(GROUPS) % 2
    _, routing = by_sequence(x, RouteContext(task=task))
    _, means = by_token(x.mean(1), RouteContext(task=task))
    expected = dense(means).repeat_interleave(LENGTH, 0)
    torch.testing.assert_close(dense(routing), expected)
    assert not by_sequence.router.causal
    assert "sequence" in by_sequence.router.needs
    if means.logits is not None:
        torch.testing.assert_close(routing.logits, means.logits.repeat_interleave(LENGTH, 0))


def test_packed_sequences_and_padding() -> None:
    """Sequences in any order; padding goes nowhere and is in no mean."""
    layer, x = make("topk", level="sequence"), inputs(GROUPS * LENGTH)
    sequence = torch.tensor([7, 3, 3, 7, 7, 1, 3, 9, 9, 9, 9, 9, 1, 7, 3, 4, 4, 7, 1, 3])
    valid = torch.arange(len(x)) % 5 != 4
    valid[sequence == 4] = False
    x = x.masked_fill(~valid.unsqueeze(1), torch.inf)
    y, routing = layer(x, RouteContext(sequence=sequence, valid=valid))
    assert y.isfinite().all()
    assert (routing.ids[~valid] == -1).all()
    for index in sequence.unique():
        own = (sequence == index) & valid
        if own.any():
            alone = layer.router(x[own].mean(0, keepdim=True), RouteContext(), layer.view)
            assert (routing.ids[own] == alone.ids).all()
            torch.testing.assert_close(routing.weights[own], alone.weights.expand(int(own.sum()), -1))


def test_losses_and_capacity_count_sequences() -> None:
    layer = make("topk", level="sequence", k=1, order="after", capacity=1.0).train()
    x = inputs(1, LENGTH).expand(GROUPS, -1, -1)  # all want the same expert, which takes one sequence
    _, routing = layer(x)
    assert (routing.ids.view(GROUPS, LENGTH)[0] >= 0).all()
    assert (routing.ids.view(GROUPS, LENGTH)[1:] == -1).all()
    assert routing.dropped is not None
    assert int(routing.dropped) == (GROUPS - 1) * LENGTH  # as tokens
    scores = x.mean(1) @ layer.router.columns["0"].weight.T
    expected = losses.switch_loss(scores.softmax(1), scores.argmax(1, keepdim=True))
    torch.testing.assert_close(routing.aux["switch"], 0.01 * expected)


def test_a_sequence_that_is_replayed_goes_where_it_went() -> None:
    layer = make("topk", level="sequence")
    y, routing = layer(inputs())
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.router.columns["0"].weight.normal_()
    again, moved = other(inputs(), RouteContext(replay=routing.ids))
    assert torch.equal(moved.ids, routing.ids)
    assert not torch.equal(moved.weights, routing.weights)
    assert torch.equal(layer(inputs(), RouteContext(replay=routing.ids))[0], y)
    assert again.isfinite().all()


def test_tasks_and_sequences_at_once() -> None:
    layer = make("topk", level="sequence", restrict="task")
    layer.assign([0, 1], 0)
    layer.assign([2, 3, 4], 1)
    task = torch.tensor([0, 1, 0, 1, 1])
    _, routing = layer(inputs(), RouteContext(task=task))
    ids = routing.ids.view(GROUPS, LENGTH, -1)
    for g in range(GROUPS):
        assert (ids[g] == ids[g, :1]).all()
        assert set(ids[g].flatten().tolist()) - {-1} <= ({0, 1} if task[g] == 0 else {2, 3, 4})


def test_the_recurrent_state_goes_on_by_token() -> None:
    layer = make("recurrent", level="sequence")
    _, routing = layer(inputs())
    assert routing.state is not None
    assert routing.state.shape == (GROUPS * LENGTH, 32)
    _, later = layer(inputs(), RouteContext(state=routing.state))
    assert not torch.equal(later.weights, routing.weights)


def test_vectors_are_sequences_of_their_own() -> None:
    layer, plain = make("topk", level="sequence"), make("topk")
    x = inputs(9)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_token_ids_have_no_mean() -> None:
    with pytest.raises(ValueError, match="level: expected 'token' where token ids decide"):
        make("hash", level="sequence")
    with pytest.raises(ValueError, match="level: expected one of"):
        make("topk", level="document")


def test_groups_of_any_order() -> None:
    sequence = torch.tensor([4, 2, 4, 9, 2, 4])
    x = torch.arange(12, dtype=torch.float64).view(6, 2)
    valid = torch.tensor([False, True, True, False, True, True])
    groups = Groups(sequence, valid, x)
    assert groups.count == 3
    assert groups.of_T.tolist() == [1, 0, 1, 2, 0, 1]
    assert groups.sizes().tolist() == [2, 2, 0]
    assert groups.first().tolist() == [1, 2, 3]
    assert groups.mean(x).tolist() == [[5.0, 6.0], [7.0, 8.0], [0.0, 0.0]]
    length, place = groups.padded()
    assert length == 3
    assert place is not None
    assert place.tolist() == [3, 0, 4, 6, 1, 5]
    assert Groups(torch.tensor([0, 0, 3, 3]), None, x[:4]).padded() == (2, None)
    assert Groups(None, None, x).padded() == (1, None)
    mixed = Groups(torch.tensor([0, 3, 0, 3]), None, x[:4]).padded()
    assert mixed[1] is not None
    assert mixed[1].tolist() == [0, 2, 1, 3]


# -- expert dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", SCORED)
def test_enough_experts_stay(router: str) -> None:
    """As many as a token needs at least, whatever is left out; and only while training."""
    layer = make(router, expert_dropout=0.9).train()
    x, token_ids = inputs(30), torch.arange(30) % 7
    seen = set()
    for seed in range(30):
        where = RouteContext(
            task=torch.arange(30) % 2, token_ids=token_ids, generator=torch.Generator().manual_seed(seed)
        )
        routing = layer.router(x, where, layer.view)
        assert min(layer.router.least(), EXPERTS) <= len(routing.columns) <= EXPERTS
        assert set(routing.ids.unique().tolist()) <= {-1, *routing.columns}
        seen.add(routing.columns)
    assert len(seen) > 1 or layer.router.least() >= EXPERTS
    layer.eval()
    where = RouteContext(task=torch.arange(30) % 2, token_ids=token_ids)
    assert layer.router(x, where, layer.view).columns == layer.ids
    assert len(layer.view._slices) == 0  # choices that never come again are not kept


def test_what_is_left_out_is_as_if_it_were_not_there() -> None:
    layer = make("topk", expert_dropout=0.5, z=0.1, orthogonality=0.1, switch=0.1).train()
    plain = make("topk", z=0.1, orthogonality=0.1, switch=0.1).train()
    plain.load_state_dict(layer.state_dict())
    x = inputs(30)
    for seed in range(5):
        routing = layer.router(x, RouteContext(generator=torch.Generator().manual_seed(seed)), layer.view)
        expected = plain.router(x, RouteContext(visible=routing.columns), plain.view)
        assert torch.equal(routing.ids, expected.ids)
        torch.testing.assert_close(routing.weights, expected.weights)
        for name, loss in expected.aux.items():
            torch.testing.assert_close(routing.aux[name], loss)


def test_dropout_is_drawn_from_the_generator_and_never_for_a_replay() -> None:
    layer = make("topk", expert_dropout=0.6).train()
    x = inputs(30)

    def columns(seed: int) -> tuple[int, ...]:
        return layer.router(x, RouteContext(generator=torch.Generator().manual_seed(seed)), layer.view).columns

    state = torch.get_rng_state()
    assert [columns(s) for s in range(8)] == [columns(s) for s in range(8)]
    assert len({columns(s) for s in range(8)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    ids = make("topk").router(x, RouteContext(), layer.view).ids
    assert torch.equal(layer.router(x, RouteContext(replay=ids), layer.view).ids, ids)


@pytest.mark.parametrize(("share", "least"), [(0.3, 1), (0.3, 4), (0.95, 2), (0.0, 1), (0.5, 9)])
def test_each_is_left_out_with_the_probability_said(share: float, least: int) -> None:
    stay = kept((20_000, 6), share, least, torch.Generator().manual_seed(0))
    counts = torch.bincount(stay.sum(1), minlength=7).double() / 20_000
    below = torch.distributions.Binomial(6, torch.tensor(1 - share)).log_prob(torch.arange(7.0)).exp().double()
    expected = below.clone()
    expected[: min(least, 6)] = 0
    expected[min(least, 6)] = below[: min(least, 6) + 1].sum()
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(stay.double().mean(0), stay.double().mean().expand(6), atol=0.015, rtol=0)


def test_a_share_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_dropout: expected at least 0 and less than 1"):
        make("topk", expert_dropout=1.0)


# -- mutual information ---------------------------------------------------------------------------------------------


def test_the_mutual_information_of_tasks_and_experts() -> None:
    layer = make("topk", mutual_information=0.3).train()
    x, task = inputs(30), torch.arange(30) % 3
    valid = torch.arange(30) % 4 != 0
    aux = layer.router(x, RouteContext(task=task, valid=valid), layer.view).aux
    probs = (x @ layer.router.columns["0"].weight.T).softmax(1)
    expected = 0.3 * losses.mutual_information_loss(probs[valid], task[valid])
    torch.testing.assert_close(aux["mutual_information"], expected)
    assert expected < -1e-4
    one = layer.router(x, RouteContext(task=2), layer.view).aux["mutual_information"]
    assert one.item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="mutual_information: expected task labels"):
        layer.router(x, RouteContext(), layer.view)
    layer.eval()  # the label is for the loss alone
    assert layer.router(x, RouteContext(), layer.view).aux == {}


def test_the_loss_draws_experts_to_tasks() -> None:
    """Trained with it alone, the choice tells the task."""
    layer = make("topk", k=1, order="after", mutual_information=1.0, switch=0.0).train()
    task = torch.arange(200) % 4
    x = inputs(200) * 0.3 + 2 * torch.eye(4, DIM, dtype=torch.float64)[task]
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        layer.router(x, RouteContext(task=task), layer.view).aux["mutual_information"].backward()
        optimizer.step()
    choice = layer.router(x, RouteContext(task=task), layer.view).ids[:, 0]
    own = [choice[task == t].mode().values.item() for t in range(4)]
    assert len(set(own)) == 4
    assert all((choice[task == t] == e).double().mean() > 0.95 for t, e in enumerate(own))


# -- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", [name for name in SCORED if name not in ("random", "recurrent")])
def test_scores_of_low_precision_are_products_in_float32(router: str, dtype: torch.dtype) -> None:
    """Those of the same numbers in float32, to the last bit: only what is given is of low precision."""
    low = make(router).to(dtype)
    exact = make(router).to(dtype).float()
    x, where = inputs(30).to(dtype), RouteContext(task=torch.arange(30) % 2, token_ids=torch.arange(30) % 7)
    a, b = low.router(x, where, low.view), exact.router(x.float(), where, exact.view)
    assert a.weights.dtype == torch.float32
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-6, atol=1e-6)
    if a.logits is not None:
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-6, atol=1e-6)


# -- options that do something --------------------------------------------------------------------------------------

LOSSES = ("switch", "importance", "z", "entropy", "mutual_information", "orthogonality")


@pytest.mark.parametrize("router", SCORED)
def test_no_option_is_without_effect(router: str) -> None:
    """A loss that a router takes reaches the router or the tokens; what could not is refused by its constructor."""
    taken = {field.name for field in dataclasses.fields(ROUTERS[router]) if field.init}
    for name in LOSSES:
        if name not in taken:
            with pytest.raises((TypeError, ValueError), match=name):
                make(router, **{name: 0.1})
            continue
        more = {"k": 2} if router == "kmeans" else {}  # one expert's weight is 1
        layer, x = make(router, **{name: 0.1}, **more).train(), inputs(GROUPS * LENGTH).requires_grad_()
        context = RouteContext(task=torch.arange(len(x)) % 3, token_ids=torch.arange(len(x)))
        loss = layer.router(x, context, layer.view).aux[name]
        found = torch.autograd.grad(loss, [x, *layer.router.parameters()], allow_unused=True)
        assert any(g is not None and float(g.abs().max()) > 1e-12 for g in found), name
    if "init_std" in taken:
        layers = [make(router, init_std=s).router.state_dict() for s in (0.02, 5.0)]
        assert any(not torch.equal(a, b) for a, b in zip(*(layer.values() for layer in layers), strict=True))


def test_orthogonality_is_of_those_that_are_visible() -> None:
    layer, x = make("topk", orthogonality=0.1, switch=0.0).train(), inputs(7)
    routing = layer.router(x, RouteContext(visible=(1, 3)), layer.view)
    routing.aux["orthogonality"].backward()
    gradient = layer.router.columns["0"].weight.grad
    assert {e for e in range(EXPERTS) if gradient[e].any()} == {1, 3}


def test_no_balance_loss_moves_the_backbone_of_a_router_that_learns_nothing_of_it() -> None:
    for router in ("kmeans", "frozen_random"):
        assert not make(router).train()(inputs(7))[1].aux


# -- what routing costs ---------------------------------------------------------------------------------------------


def test_parameters_and_operations_of_one_token() -> None:
    d, e = DIM, EXPERTS

    def cost(router: str, **options: Any) -> tuple[int, int]:
        found = make(router, **options).router
        return found.active_parameters(), found.flops_per_token()

    assert cost("topk") == (d * e, 2 * d * e)
    assert cost("per_task", tasks=16) == (d * e, 2 * d * e)  # one task's
    assert cost("task_embedding", tasks=64, rank=3) == ((d + 3) * e + 3, 2 * (d + 3) * e)
    assert cost("task_embedding", tasks=64, rank=3, alone=True) == (3 * e + 3, 2 * 3 * e)
    assert cost("dselect_k", gate="task", tasks=4, k=2, bits=3) == (2 * 3 + 2, 2 * (2 * 3 + 2))
    assert cost("kmeans") == cost("frozen_random") == (0, 2 * d * e)
    assert cost("hash") == cost("random") == cost("task_table") == (0, 0)
    assert cost("stable_moe", rank=4) == ((d + 4) * e + 4 * d, 2 * ((d + 4) * e + 4 * d))
    assert cost("stable_moe", rank=4, distil="token_ids", vocabulary=99) == ((d + 4) * e + 4, 2 * ((d + 4) * e + 4))
    # two halves of a query of three dimensions for each of four heads; a grid of 2 x 3 keys for five experts
    assert cost("product_keys", heads=4, rank=3, k=2)[1] == 2 * (d * 4 * 2 * 3 + 4 * (2 + 3) * 3)
    assert cost("attention") == (3 * d * e, 2 * 3 * d * e + 4 * e * e)
    layer = make("per_task", tasks=16)
    assert layer.parameter_counts()[1] == make("topk").parameter_counts()[1]
    assert layer.flops_per_token() == make("topk").flops_per_token()


# -- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["per_task", "task_embedding", "task_table"])
def test_negative_task_labels_are_refused(router: str) -> None:
    layer = make(router)
    for task in (-1, torch.tensor([0, -1, 1])):
        with pytest.raises(ValueError, match="expected task labels from 0"):
            layer(inputs(3), RouteContext(task=task))
    with pytest.raises(ValueError, match="labels from 0"):
        layer.add_experts(1, tasks=[2, -1])


def test_a_state_survives_routing_apart_by_task() -> None:
    layer, task = make("recurrent", restrict="task"), torch.arange(8) % 2
    layer.assign([0, 1, 2], 0)
    layer.assign([2, 3, 4], 1)
    x, before = inputs(8), torch.randn(8, 32, dtype=torch.float64)
    together = layer.router(x, RouteContext(task=task, state=before), layer.view)
    for label in (0, 1):
        own = task == label
        alone = layer.router(x[own], RouteContext(task=label, state=before[own]), layer.view)
        torch.testing.assert_close(together.state[own], alone.state)
        assert torch.equal(together.ids[own], alone.ids)
