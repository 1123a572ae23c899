"""Properties over every router × expert × dispatch × dtype."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from cmoe.moe import ROUTERS as catalogue
from cmoe.moe import MoELayer, RouteContext

_spec = importlib.util.spec_from_file_location("moe_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

DIM, HIDDEN, OUT, TOKENS = 8, 16, 24, 37

ROUTERS = {
    "topk2": {"name": "topk", "k": 2},
    "topk1_after": {"name": "topk", "k": 1, "order": "after"},
    "topk3_after": {"name": "topk", "k": 3, "order": "after"},
    "noisy": {"name": "topk", "k": 2, "noise": "shazeer", "importance": 0.1, "load": 0.1, "z": 0.001},
    "table": {"name": "task_table"},
}
CONV = {"name": "conv", "activation": "silu"}
EXPERTS = {
    "gelu": {"expert": {"name": "ffn", "activation": "gelu"}},
    "relu": {"expert": {"name": "ffn", "activation": "relu", "bias": False}},
    "swiglu": {"expert": {"name": "ffn", "activation": "swiglu"}},
    "linear_relu": {"expert": {"name": "linear", "activation": "relu"}},
    "linear_tanh": {"expert": {"name": "linear", "activation": "tanh", "bias": False}},
    "linear_none": {"expert": {"name": "linear", "activation": "none"}},
    "lora": {"expert": {"name": "lora", "rank": 8, "alpha": 6.0}},
    "adapter": {"expert": {"name": "adapter", "bottleneck": 8, "activation": "relu"}},
    "copy": {"expert": "copy", "out_dim": DIM},
    "constant": {"expert": "constant", "out_dim": DIM},
    "conv": {"expert": CONV},
    "separable": {"expert": {"name": "conv", "separable": True, "kernel": 5, "bias": False}},
    "mixed": {  # kinds and sizes in one layer
        "expert": {"name": "ffn", "activation": "gelu"},
        "out_dim": DIM,
        "more": [
            {"experts": 1, "hidden": 32},
            {"experts": 2, "expert": {"name": "lora", "rank": 8}},
            {"experts": 1, "expert": "zero"},
            {"experts": 2, "expert": "copy"},
            {"experts": 2, "expert": "constant"},
        ],
    },
    "mixed_maps": {
        "expert": CONV,
        "out_dim": DIM,
        "more": [
            {"experts": 2, "expert": "ffn"},
            {"experts": 1, "expert": {**CONV, "kernel": 1}, "hidden": 8},
            {"experts": 1, "expert": "zero"},
            {"experts": 2, "expert": "copy"},
            {"experts": 2, "expert": "constant"},
        ],
    },
}
MAPS = ("conv", "separable", "mixed_maps")  # a unit is a map, and not a token
PATHS = ("auto", "grouped", "loop", "bmm", "dense")
DTYPES = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 6e-2}


def make(router, expert, path="auto", dtype=torch.float32, added=True):
    """A layer of several cohorts with an expert removed and a cohort split, so that nothing is in its simplest order."""
    options = {"out_dim": OUT, **EXPERTS[expert]}
    layer = MoELayer(
        DIM,
        HIDDEN,
        experts=4,
        router=dict(ROUTERS[router] if isinstance(router, str) else router),
        dispatch=path,
        **options,
    )
    if added:
        layer.add_experts(1)
        layer.add_experts(3)
        layer.remove([2])
        some = [e for e in (6, 9, 11) if e in layer.ids]
        layer.freeze(some)
        layer.thaw(some)
        layer.assign([0], 0)
        layer.assign([1, 4], 1)
        layer.assign([6, 0, 7], 2)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "router" in name:
                p.normal_(0, 0.7)
            elif not p.any():  # an output that is zero at the start
                p.normal_(0, 0.3)
    return layer.to(dtype)


def units(expert, tokens=TOKENS, **options):
    return torch.randn(tokens, *((4, 3) if expert in MAPS else ()), DIM, **options)


def context_for(router, tokens=TOKENS, **more):
    if router != "table":
        return RouteContext(**more)
    return RouteContext(task=torch.arange(tokens) % 3, **more)


# every kind with one router, and some with all; all with all are below
SOME = ("gelu", "swiglu", "mixed", "mixed_maps")
CASES = [c for c in itertools.product(ROUTERS, EXPERTS, PATHS, DTYPES) if c[0] == "topk2" or c[1] in SOME]


@pytest.mark.parametrize(("router", "expert", "path", "dtype"), CASES)
def test_outputs_and_gradients_equal_a_dense_reference(router, expert, path, dtype):
    if path == "grouped" and dtype == "float64":
        pytest.skip("grouped_mm takes no float64")
    if path == "grouped" and expert in MAPS:
        with pytest.raises(ValueError, match=r"dispatch: expected 'auto' or one of .* for Conv, got 'grouped'"):
            make(router, expert, path)
        return
    tolerance = DTYPES[dtype]
    layer = make(router, expert, path, getattr(torch, dtype))
    layer.eval()  # noise is checked on its own
    x = units(expert, dtype=getattr(torch, dtype), requires_grad=True)
    context = context_for(router)
    y, routing = layer(x, context)
    assert y.shape == (*x.shape[:-1], layer.out_dim)
    assert y.dtype == x.dtype

    params = reference.leaves(layer)
    x64 = x.detach().double().requires_grad_()
    chosen = [set(row) - {-1} for row in routing.ids.tolist()]
    if router == "table":
        wanted = [{0}, {1, 4}, {6, 0, 7}]
        assert chosen == [wanted[t % 3] for t in range(TOKENS)]
        weights = torch.tensor([[(e in row) / len(row) for e in layer.ids] for row in chosen], dtype=torch.float64)
    else:
        weights = reference.topk_weights(layer, x64, params, chosen, ROUTERS[router].get("order", "before"))
        if dtype != "bfloat16":  # the choice itself is the top k of the reference's logits
            best = reference.router_logits(layer, x64, params).topk(ROUTERS[router]["k"], 1).indices.tolist()
            assert chosen == [{layer.ids[c] for c in row} for row in best]
    expected = reference.combine(reference.all_outputs(layer, x64, params), weights, layer.ids)
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((y.detach().double() - expected.detach()).abs().max()) <= tolerance * scale

    direction = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    (y * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    got = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    want = {"x": x64.grad, **{name: p.grad for name, p in params.items()}}
    for name, value in want.items():
        mine = got[name]
        if mine is None:  # nobody of that cohort was chosen, or noise that was off
            assert value is None or float(value.abs().max()) == 0, name
            continue
        value = torch.zeros_like(mine, dtype=torch.float64) if value is None else value
        scale = max(1.0, float(value.abs().max()))
        assert float((mine.double() - value).abs().max()) <= tolerance * scale, name


# the other paths are held in float32 and bfloat16 by the test before this one, with every kind of expert
SEEN_IN = {"float64": PATHS, "float32": ("auto", "grouped"), "bfloat16": ("auto",)}
EVERY_ROUTER = [name for name, router in catalogue.items() if router.routing_kind == "sparse"]


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("router", EVERY_ROUTER)
def test_every_router_reaches_every_kind_of_expert_on_every_path_in_every_type(router, expert):
    """What the layer makes of a router's weights, and what gradient it gives them, is the plain weighted sum in float64.

    That a router's weights and their gradients are right is the matter of `routers/test_all.py`.
    """
    layer = make({"name": router}, expert).eval()
    known = {"task": torch.arange(11) % 3, "token_ids": torch.arange(11) * 7 % 5, "sequence": torch.arange(11) // 4}
    for dtype, tolerance in DTYPES.items():
        layer.to(getattr(torch, dtype))
        x = units(expert, 11, dtype=getattr(torch, dtype))
        expected: list[torch.Tensor] | None = None
        for path in SEEN_IN[dtype]:
            if path == "grouped" and (dtype == "float64" or expert in MAPS):
                continue
            layer.dispatch = path
            mine = x.clone().requires_grad_()
            y, routing = layer(mine, RouteContext(generator=torch.Generator().manual_seed(0), **known))
            if expected is None:  # a path changes nothing of the routing
                direction = torch.randn(y.shape).to(y.dtype)
                expected = plain_sum(layer, x, routing, direction)
            parameters = [p for name, p in layer.named_parameters() if name.startswith("cohorts.")]
            asked = [*parameters, *([routing.weights] if routing.weights.requires_grad else [])]
            got = torch.autograd.grad((y * direction).sum(), asked, allow_unused=True) if asked else ()
            found = [torch.zeros_like(b) if a is None else a for a, b in zip([y, *got], expected, strict=False)]
            if len(asked) > len(parameters):
                found[-1] = found[-1].masked_fill(routing.ids < 0, 0.0)  # of nobody's weight nobody asks
            for what, (a, b) in enumerate(zip(found, expected, strict=False)):
                a = a.detach().double()
                if not b.numel():
                    continue
                if what and dtype == "bfloat16" and expert in ("relu", "linear_relu", "adapter"):
                    continue  # a rounded sum may stand on the other side of the bend
                assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())), (path, dtype)


def plain_sum(layer, x, routing, direction):
    """The output in float64, and the gradients of <direction, output>: of every cohort's parameters, and of the weights."""
    params, x64 = reference.leaves(layer), x.double()
    dense = torch.zeros(len(x), max(layer.ids) + 2, dtype=torch.float64)
    dense = dense.scatter_add(1, routing.ids + 1, routing.weights.detach().double())[:, 1:]
    weights = dense[:, list(layer.ids)].requires_grad_()
    y = reference.combine(reference.all_outputs(layer, x64, params), weights, layer.ids)
    leaves = [*(p for name, p in params.items() if name.startswith("cohorts.")), weights]
    found = torch.autograd.grad((y * direction.double()).sum(), leaves, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    found[-1] = found[-1].gather(1, layer.view.to_columns(routing.ids)).masked_fill(routing.ids < 0, 0.0)
    return [y.detach(), *found]


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("tasks", [0, 1, 2])
def test_one_task_per_batch_equals_the_same_label_per_token(expert, tasks):
    layer = make("table", expert, dtype=torch.float64)
    x = units(expert, 15, dtype=torch.float64).unflatten(0, (3, 5))
    fast, uniform = layer(x, RouteContext(task=tasks))
    slow, routing = layer(x, RouteContext(task=torch.full((15,), tasks)))
    per_sample, _ = layer(x, RouteContext(task=torch.full((3,), tasks)))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast, per_sample, rtol=0, atol=1e-12)
    assert torch.equal(uniform.ids, routing.ids)
    assert torch.equal(uniform.weights, routing.weights)
    assert fast.shape == (*x.shape[:-1], layer.out_dim)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("router", ROUTERS)
def test_permutation_equivariance(router, path):
    layer = make(router, "gelu", path)
    layer.eval()
    x = torch.randn(TOKENS, DIM)
    order = torch.randperm(TOKENS)
    context = context_for(router)
    permuted = RouteContext(task=context.task[order]) if router == "table" else context
    y, routing = layer(x, context)
    y_permuted, routing_permuted = layer(x[order], permuted)
    torch.testing.assert_close(y_permuted, y[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(routing_permuted.ids, routing.ids[order])


@pytest.mark.parametrize("router", ROUTERS)
def test_causality(router):
    layer = make(router, "gelu")
    layer.eval()
    x = torch.randn(TOKENS, DIM)
    changed = x.clone()
    changed[20:] = torch.randn(TOKENS - 20, DIM)
    y, routing = layer(x, context_for(router))
    y_changed, routing_changed = layer(changed, context_for(router))
    assert torch.equal(routing.ids[:20], routing_changed.ids[:20])
    torch.testing.assert_close(y[:20], y_changed[:20], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_weights_and_k(router, training):
    layer = make(router, "gelu")
    layer.train(training)
    valid = torch.arange(TOKENS) % 4 != 0
    _, routing = layer(torch.randn(TOKENS, DIM), context_for(router, valid=valid))
    assert routing.ids.dtype == torch.int64
    assert (routing.weights >= 0).all()
    sums = routing.weights.sum(1)
    if ROUTERS[router].get("order") == "after":
        assert (sums[valid] <= 1 + 1e-6).all()
        assert (sums[valid] > 0).all()
    else:
        torch.testing.assert_close(sums[valid], torch.ones(int(valid.sum())), rtol=0, atol=1e-6)
    assert (sums[~valid] == 0).all()
    assert (routing.ids[~valid] == -1).all()
    for row, ok in zip(routing.ids.tolist(), valid.tolist(), strict=True):
        present = [e for e in row if e != -1]
        assert len(set(present)) == len(present)
        assert set(present) <= set(layer.ids)
        if layer.router.exact_k and ok:
            assert len(present) == layer.router.k
    assert bool(routing.aux) == (training and router != "table")
    assert all(value.dim() == 0 and value.isfinite() for value in routing.aux.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("expert", ["swiglu", "mixed", "mixed_maps"])
def test_empty_batch_and_one_token(router, path, tokens, expert):
    if path == "grouped" and expert in MAPS:
        pytest.skip("refused")
    layer = make(router, expert, path)
    x = units(expert, tokens, requires_grad=True)
    y, routing = layer(x, context_for(router, tokens))
    assert y.shape == (*x.shape[:-1], layer.out_dim)
    assert routing.ids.shape[0] == tokens
    (y.sum() + sum(routing.aux.values())).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_to_unselected_experts_and_none_to_frozen_ones(path):
    layer = make("topk2", "gelu", path)
    layer.freeze([0, 1])
    visible = (0, 1, 3, 4)  # 5, 6, 7 and their columns must see nothing
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    y, routing = layer(x, RouteContext(visible=visible))
    assert routing.columns == tuple(e for e in layer.ids if e in visible)
    assert set(routing.ids.flatten().tolist()) <= set(visible)
    (y.square().sum() + sum(routing.aux.values())).backward()
    assert x.grad.abs().sum() > 0
    for modules in layer.stacked_modules():
        for key, module in modules.items():
            for row, expert in enumerate(layer.cohort_ids[key]):
                for p in module.parameters():
                    if expert in (0, 1):
                        assert p.grad is None
                    elif expert in visible:
                        assert p.grad[row].abs().sum() > 0
                    else:
                        assert p.grad is None or p.grad[row].abs().sum() == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("idle", [True, False])
def test_zero_token_experts(path, idle):
    """One busy expert among many: right output, and a gradient of exactly zero for the idle ones."""
    layer = make("table", "gelu", path, added=False)
    tasks = torch.full((TOKENS,), 1) if idle else torch.arange(TOKENS) % 2
    x = torch.randn(TOKENS, DIM)
    y, _ = layer(x, RouteContext(task=tasks))
    outputs = reference.all_outputs(layer, x.double(), reference.leaves(layer))
    expected = torch.stack([outputs[int(t)][i] for i, t in enumerate(tasks)])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    used = set(tasks.tolist())
    for p in layer.cohorts["0"].parameters():
        for expert in range(4):
            assert bool(p.grad[expert].abs().sum() > 0) == (expert in used)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("router", ROUTERS)
def test_exact_replay(router, path):
    layer = make(router, "gelu", path)
    layer.eval()
    x = torch.randn(TOKENS, DIM)
    context = context_for(router, valid=torch.arange(TOKENS) % 5 != 0)
    y, routing = layer(x, context)
    recorded = routing.ids.clone()
    y_again, again = layer(x, RouteContext(replay=recorded))
    assert torch.equal(y, y_again)
    assert torch.equal(again.ids, recorded)
    assert torch.equal(again.weights, routing.weights)
    # other weights, the same choice
    with torch.no_grad():
        for p in layer.router.parameters():
            p.normal_()
    _, moved = layer(x, RouteContext(replay=recorded))
    assert torch.equal(moved.ids, recorded)
    recorded[3, 0] = 2  # was removed
    with pytest.raises(ValueError, match=r"replay.*\[2\]"):
        layer(x, RouteContext(replay=recorded))


def test_noise_is_drawn_from_the_generator_and_only_in_training():
    layer = make("noisy", "gelu")
    x = torch.randn(TOKENS, DIM)

    def run(seed):
        return layer(x, RouteContext(generator=torch.Generator().manual_seed(seed)))[1]

    state = torch.get_rng_state()
    assert torch.equal(run(1).weights, run(1).weights)
    assert not torch.equal(run(1).weights, run(2).weights)
    assert torch.equal(torch.get_rng_state(), state)
    layer.eval()
    assert torch.equal(run(1).weights, run(2).weights)
    assert not torch.equal(layer(x, RouteContext(training=True))[1].weights, run(1).weights)


def test_noisy_weights_follow_the_paper():
    """H = xWg + N(0,1)·softplus(xWn), top-k, softmax (Shazeer et al. 2017, equations 3 to 5)."""
    layer = MoELayer(DIM, HIDDEN, experts=5, router={"name": "topk", "k": 2, "noise": "shazeer"}).double()
    columns = layer.router.columns["0"]
    with torch.no_grad():
        columns.noise.normal_()
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    _, routing = layer(x, RouteContext(generator=torch.Generator().manual_seed(3)))
    noise = torch.randn(TOKENS, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = x @ columns.weight.T + noise * torch.log1p((x @ columns.noise.T).exp())
    values, ids = h.sort(1, descending=True)
    assert torch.equal(routing.ids, ids[:, :2])
    expected = values[:, :2].exp() / values[:, :2].exp().sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("expert", EXPERTS)
def test_autocast_keeps_scores_in_float32_and_every_path_agrees(expert):
    for path in PATHS:
        if path == "grouped" and expert in MAPS:
            continue
        torch.manual_seed(1)
        layer = make("topk2", expert, path)
        x = units(expert)
        exact, want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, routing = layer(x)
        assert routing.logits.dtype == torch.float32
        assert torch.equal(routing.ids, want.ids)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)
        y.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("expert", ["gelu", "mixed", "conv"])
def test_gradients_through_torch_func(expert):
    layer = make("topk2", expert, "loop")
    x = units(expert)
    params = dict(layer.named_parameters())

    def loss(p):
        return torch.func.functional_call(layer, p, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(params)
    layer(x)[0].square().sum().backward()
    for name, p in params.items():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grads[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expert", ["swiglu", "mixed", "mixed_maps"])
def test_two_runs_are_bit_identical(expert):
    def once():
        torch.manual_seed(5)
        layer = make("noisy", expert)
        x = units(expert, requires_grad=True)
        y, routing = layer(x)
        (y.square().sum() + sum(routing.aux.values())).backward()
        return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
