"""One expert alone, and the layer without one, for every router; nothing of the layer may change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cmoe.moe import ROUTERS, MoELayer, RouteContext, UniformRouting
from cmoe.moe.diagnostics import alone, reachable, silent, without

DIM, TOKENS = 8, 20


def layer_of(router: str | dict[str, Any]) -> MoELayer:
    """A layer of two cohorts with an expert removed between them, in evaluation mode."""
    layer = MoELayer(DIM, 8, experts=3, router=router)
    layer.add_experts(2)
    layer.remove([1])
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return layer.double().eval()


def inputs(valid: bool = False) -> tuple[torch.Tensor, RouteContext]:
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    mask = torch.arange(TOKENS) % 5 != 2 if valid else None
    generator = torch.Generator().manual_seed(0)
    return x, RouteContext(task=1, token_ids=torch.arange(TOKENS) * 7 % 11, valid=mask, generator=generator,
                           sequence=torch.arange(TOKENS) // 4)  # fmt: skip


def state(layer: MoELayer) -> dict[str, Any]:
    return copy.deepcopy({"weights": layer.state_dict(), "structure": layer.structure()})


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = a["weights"].keys() == b["weights"].keys()
    return weights and all(torch.equal(w, b["weights"][n]) for n, w in a["weights"].items()) and a["structure"] == b["structure"]  # fmt: skip


def sparse(router: str) -> MoELayer:
    layer = layer_of(router)
    if layer(*inputs())[1].kind != "sparse":
        pytest.skip("it assigns no token to an expert")
    return layer


@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "padded"])
@pytest.mark.parametrize("router", ROUTERS)
def test_an_expert_alone_is_a_dense_layer(router: str, padded: bool) -> None:
    layer = sparse(router)
    x, where = inputs(padded)
    before, usual = state(layer), layer(x, where)[0]
    for expert in layer.ids:
        with alone(layer, expert):
            y, routing = layer(x, where)
        key, row = layer.view.where[expert]
        expected = layer.cohorts[key].single(x, row)
        if where.valid is not None:
            expected = expected.masked_fill(~where.valid.unsqueeze(1), 0.0)
        torch.testing.assert_close(y, expected)
        assert set(routing.ids.unique().tolist()) <= {-1, expert}
    with silent(layer):
        assert not layer(x, where)[0].any()
    assert same(before, state(layer))
    if router != "random":
        assert torch.equal(layer(x, inputs(padded)[1])[0], usual)
    assert not layer.router._forward_hooks
    assert not layer.router._forward_pre_hooks


def test_what_works_on_every_token_goes_on() -> None:
    base = torch.nn.Linear(DIM, DIM)
    layer = MoELayer(DIM, 8, experts=3, shared=1, base=base).double().eval()
    x, where = inputs(True)
    assert layer.shared is not None
    rest = (layer.shared.single(x, 0) + base(x)).masked_fill(~where.valid.unsqueeze(1), 0.0)
    with silent(layer):
        torch.testing.assert_close(layer(x, where)[0], rest)
    with alone(layer, 2):
        own = layer.cohorts["0"].single(x, 2).masked_fill(~where.valid.unsqueeze(1), 0.0)
        torch.testing.assert_close(layer(x, where)[0], rest + own)


@pytest.mark.parametrize("router", ROUTERS)
def test_without_an_expert_the_layer_is_as_if_it_were_removed(router: str) -> None:
    layer = sparse(router)
    x, where = inputs(True)
    before = state(layer)
    for expert in layer.ids:
        with without(layer, expert, 1):
            y, routing = layer(x, inputs(True)[1])
        assert expert not in routing.ids
        assert (routing.ids[~where.valid] == -1).all()
        if router in ("random", "task_table"):  # drawn anew; the table falls back on the next expert
            continue
        smaller = copy.deepcopy(layer)
        smaller.remove([expert])
        torch.testing.assert_close(y, smaller.eval()(x, inputs(True)[1])[0])
    assert same(before, state(layer))


@pytest.mark.parametrize("router", ["task_table", {"name": "topk", "restrict": "task"}], ids=str)
def test_what_a_task_may_reach(router: str | dict[str, Any]) -> None:
    layer = layer_of(router)
    layer.assign([0, 3], 0)
    layer.assign([4], 1)
    assert reachable(layer, 0) == (0, 3)
    assert reachable(layer, 1) == (4,)
    x, _ = inputs()
    usual = {task: layer(x, RouteContext(task=task))[0] for task in (0, 1)}
    with without(layer, 4, 1):  # its only expert
        assert not layer(x, RouteContext(task=1))[0].any()
    with without(layer, 4, 0):  # it never had this one
        assert torch.equal(layer(x, RouteContext(task=0))[0], usual[0])
    with without(layer, 3, 0):
        y, routing = layer(x, RouteContext(task=0))
    assert set(routing.ids.unique().tolist()) == {0}
    with alone(layer, 0):  # also one that the task may not see
        torch.testing.assert_close(layer(x, RouteContext(task=1))[0], layer.cohorts["0"].single(x, 0))
    assert isinstance(layer(x, RouteContext(task=1))[1], UniformRouting) == (router == "task_table")
    del y


def test_a_router_sees_only_what_the_context_and_the_question_allow() -> None:
    layer = layer_of({"name": "topk", "k": 4})
    x, _ = inputs()
    with without(layer, 3):
        _, routing = layer(x, RouteContext(visible=(2, 3, 4)))
    assert set(routing.ids.unique().tolist()) == {2, 4}


def test_what_later_layers_are_told_stays() -> None:
    layer = layer_of("recurrent")
    x, where = inputs()
    told = layer(x, where)[1].state
    with alone(layer, 2):
        assert torch.equal(layer(x, where)[1].state, told)


def test_hooks_go_when_something_breaks() -> None:
    layer = layer_of("topk")
    for question in (alone(layer, 2), without(layer, 2), silent(layer)):
        with pytest.raises(RuntimeError, match="broken"), question:
            raise RuntimeError("broken")
    assert not layer.router._forward_hooks
    assert not layer.router._forward_pre_hooks
    for question in (alone, without):
        with (
            pytest.raises(ValueError, match=r"expected expert ids among \[0, 2, 3, 4\], got \[1\]"),
            question(layer, 1),
        ):
            pass
