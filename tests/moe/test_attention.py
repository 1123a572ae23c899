"""MoA and MoH against loops over tokens, heads and places in float64, and what holds for any layer of experts."""

from __future__ import annotations

import copy
import io
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cmoe.backbones.transformer import Packing
from cmoe.moe import NONE, MoA, MoH, RouteContext, migrate_optimizer

B, L, D, S = 3, 6, 16, 8
MAKERS = {
    "moa": lambda **o: MoA(D, 5, S, **o),
    "moa_plain": lambda **o: MoA(D, 8, bias=False, **o),
    "moh": lambda **o: MoH(D, 5, S, **o),
    "moh_shared": lambda **o: MoH(D, 4, S, shared=2, **o),
    "moh_one_shared": lambda **o: MoH(D, 7, shared=1, bias=False, **o),
    "moh_unscaled": lambda **o: MoH(D, 4, S, shared=2, scaled=False, **o),
}
PATHS = {"moa": ("auto", "loop", "bmm", "grouped", "dense"), "moh": ("auto", "dense")}
ROUTERS = {
    "topk2": {"name": "topk", "k": 2},
    "topk1_after": {"name": "topk", "k": 1, "order": "after"},
    "table": {"name": "task_table"},
    "threshold": {"name": "threshold"},  # as many heads as are sure enough, or none
}
CASES = [
    (name, path, router)
    for name, router in itertools.product(MAKERS, ROUTERS)
    for path in PATHS[name.partition("_")[0]]
]


def make(name, path="auto", router="topk2", added=True):
    """A layer of several cohorts, with a head removed and a cohort split."""
    torch.manual_seed(0)
    layer = MAKERS[name](router=dict(ROUTERS[router]), dispatch=path)
    if added:
        layer.add_experts(3)
        if name.startswith("moh"):
            layer.add_experts(1, hidden=4)  # a smaller head
        layer.remove([1])
        layer.freeze([0, 6])
        layer.thaw([0, 6])
        for task, ids in enumerate(([0], [2, 5], [7, 3, 0])):
            layer.assign(ids, task)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "router" in name or name == "bias":
                p.normal_(0, 0.7)
    return layer


def context_for(router, **more):
    return RouteContext(task=torch.arange(B) % 3 if router == "table" else None, **more)


def by_loop(layer, x, weights, params, causal, valid):
    """Token by token, head by head, place by place; `weights` (T, E) of the heads in the layer's order."""

    def rows_of(prefix, n):
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return [{name: p[row] for name, p in own.items()} for row in range(n)]

    heads = [head for key, ids in layer.cohort_ids.items() for head in rows_of(f"cohorts.{key}.", len(ids))]
    if "balance.weight" in params:
        alpha = (x.flatten(0, 1) @ params["balance.weight"].T).softmax(1)
        n = layer.shared.n
        own = torch.ones(len(alpha), 1, dtype=x.dtype)
        if "share.weight" in params:
            own = (x.flatten(0, 1) @ params["share.weight"].T).softmax(1)
        if layer.scaled:
            alpha, own = 2 * alpha, n * own
        weights = torch.cat([weights * alpha[:, 1:], own * alpha[:, :1]], 1)
        heads += rows_of("shared.", n)

    def mapped(head, part, v):
        if part in ("k", "v") and "kv.weight" in params:
            w, b = params["kv.weight"].T, params.get("kv.bias")
            half = slice(0, w.shape[1] // 2) if part == "k" else slice(w.shape[1] // 2, None)
            return v @ w[:, half] + (0 if b is None else b[half])
        y = v @ head[f"{part}.w"]
        return y + head[f"{part}.b"] if f"{part}.b" in head else y

    rows, maps = [], [[mapped(head, part, x) for part in "qkv"] for head in heads]
    for b, t in itertools.product(range(B), range(L)):
        total = torch.zeros(D, dtype=x.dtype)
        seen = [m for m in range(L) if (not causal or m <= t) and (valid is None or causal or bool(valid[b, m]))]
        for e, (q, k, v) in enumerate(maps):
            a = ((k[b, seen] @ q[b, t]) / q.shape[2] ** 0.5).softmax(0)
            total = total + weights[b * L + t, e] * (a @ v[b, seen] @ heads[e]["o.w"])
        rows.append(total + params["bias"] if "bias" in params else total)
    y = torch.stack(rows).view(B, L, D)
    return y if valid is None else y * valid.unsqueeze(2)


def dense_weights(layer, routing, x, params):
    """(T, E) with the graph of the router's parameters where it has any; the choice itself is taken as it is."""
    chosen = torch.stack([(routing.ids == e).any(1) for e in layer.ids], 1).double()
    if layer.router.score.__class__.__name__ != "Linear" if hasattr(layer.router, "score") else True:
        weights = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    else:
        columns = torch.cat([params[f"router.columns.{key}.weight"] for key in layer.cohort_ids])
        logits = x.flatten(0, 1) @ columns.T
        e = (logits - logits.detach().max(1, keepdim=True).values).exp()
        if getattr(layer.router, "order", "before") == "after":
            weights = e / e.sum(1, keepdim=True) * chosen
        else:
            weights = e * chosen / (e * chosen).sum(1, keepdim=True).clamp(min=1e-30)
    if isinstance(layer, MoH) and layer.scaled:
        weights = weights * chosen.sum(1, keepdim=True)
    return weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "path", "router"), [c for c in CASES if c[2] != "threshold" and c[1] in ("auto", "dense")]
)
def test_outputs_and_gradients_equal_a_loop(name, path, router, causal, padded):
    layer = make(name, path, router).double().eval()
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(L) < torch.tensor([[L], [4], [1]]) if padded else None
    y, routing = layer(x, context_for(router, valid=valid), causal)
    params = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x_again = x.detach().clone().requires_grad_()
    weights = dense_weights(layer, routing, x_again, params)
    if padded:
        flat = valid.flatten()
        assert (routing.ids[~flat] == NONE).all()
        weights = torch.where(flat.unsqueeze(1), weights, 0.0)
    expected = by_loop(layer, x_again, weights, params, causal, valid)
    assert y.shape == (B, L, D)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_again.grad, rtol=1e-9, atol=1e-9)
    for n, p in layer.named_parameters():
        want = params[n].grad
        got = p.grad if p.grad is not None else torch.zeros_like(p)
        torch.testing.assert_close(got, torch.zeros_like(p) if want is None else want, rtol=1e-9, atol=1e-9, msg=n)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", [n for n in MAKERS if n.startswith("moa")])
def test_every_dispatch_gives_the_same(name, router):
    x, found = torch.randn(B, L, D), []
    for path in PATHS["moa"]:
        if path == "grouped" and name == "moa_plain":  # heads of 2, which no grouped product takes
            continue
        layer = make(name, path, router, added=name == "moa")
        y, routing = layer(x, context_for(router), True)
        y.square().sum().backward()
        found.append(
            (y, routing.ids, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}, layer.usage)
        )
    for y, ids, grads, usage in found[1:]:
        assert torch.equal(ids, found[0][1])
        torch.testing.assert_close(y, found[0][0], rtol=1e-4, atol=1e-5)
        assert usage == found[0][3]
        for n, grad in grads.items():
            torch.testing.assert_close(grad, found[0][2].get(n, torch.zeros_like(grad)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ["topk2", "table"])
@pytest.mark.parametrize("name", MAKERS)
def test_packed_tokens_are_as_padded_ones(name, router):
    layer = make(name, router=router).double().eval()
    valid = torch.arange(L) < torch.tensor([[L], [2], [4]])
    packing = Packing(valid)
    x = torch.randn(B, L, D, dtype=torch.float64)
    task = torch.arange(B)
    y, _ = layer(x, RouteContext(task=task, valid=valid))
    packed, routing = layer(
        packing.pack(x), RouteContext(task=task.index_select(0, packing.sequence())), False, packing
    )
    assert routing.ids.shape[0] == packed.shape[0] == int(valid.sum())
    torch.testing.assert_close(packing.unpack(packed), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", ["topk2", "table"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("cut", [1, 4])
def test_the_causal_mask_holds(name, router, cut):
    layer = make(name, router=router).eval()
    x = torch.randn(B, L, D)
    changed = x.clone()
    changed[:, cut:] = torch.randn(B, L - cut, D)
    before, after = (layer(v, context_for(router), True)[0] for v in (x, changed))
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-6)
    assert (after[:, cut:] - before[:, cut:]).abs().max() > 1e-2
    both_ways = [layer(v, context_for(router))[0] for v in (x, changed)]
    assert (both_ways[0][:, :cut] - both_ways[1][:, :cut]).abs().max() > 1e-4


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_moh_with_equal_weights_is_ordinary_attention(shared, causal):
    plain = nn.MultiheadAttention(D, 4, batch_first=True).double()
    nn.init.normal_(plain.in_proj_bias)
    nn.init.normal_(plain.out_proj.bias)
    layer = MoH(D, 4 - shared, shared=shared, router="dense").double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("router", "balance", "share.")):
                p.zero_()
    qkv = nn.Linear(D, 3 * D).double()
    qkv.load_state_dict({"weight": plain.in_proj_weight, "bias": plain.in_proj_bias})
    layer.adopt(qkv, plain.out_proj, 4)
    x = torch.randn(B, L, D, dtype=torch.float64)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1) if causal else None
    expected, _ = plain(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(layer(x, None, causal)[0], expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"heads: expected 4 of size 4, .* got 2 of size 8"):
        MoH(D, 2).double().adopt(qkv, plain.out_proj, 4)
    with pytest.raises(ValueError, match="bias: expected one"):
        MoH(D, 4, bias=False).double().adopt(qkv, plain.out_proj, 4)


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_heads_stay_bit_identical_and_the_others_learn(name):
    layer = make(name)
    optim = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    migrate_optimizer(optim, layer.freeze([0, 5]))
    assert layer.frozen_ids == {0, 5}

    def rows():
        return {
            (e, n, what): p.detach()[r].clone()
            for what, modules in enumerate(layer.stacked_modules())
            for key, module in modules.items()
            for n, p in module.named_parameters()
            for r, e in enumerate(layer.cohort_ids[key])
        }

    before = rows()
    for seed in range(4):
        x = torch.randn(8, L, D, generator=torch.Generator().manual_seed(seed))
        optim.zero_grad(set_to_none=False)
        y, routing = layer(x)
        ((y - x).square().mean() + sum(routing.aux.values())).backward()
        optim.step()
    after = rows()
    assert len(layer.usage) == len(layer.ids)
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (key[0] in (0, 5)), key


@pytest.mark.parametrize("mode", ["label", "labels", "visible", "restrict"])
@pytest.mark.parametrize(("name", "path"), [(n, p) for n in MAKERS for p in ("auto", "dense")])
def test_old_outputs_are_bit_identical_after_heads_were_added_and_trained(name, path, mode):
    router = {"visible": {"name": "topk"}, "restrict": {"name": "topk", "restrict": "task"}}.get(
        mode, {"name": "task_table"}
    )
    layer = MAKERS[name](router=router, dispatch=path).eval()
    layer.assign([0], 0)
    layer.assign([1, 3], 1)
    old = {
        "label": [RouteContext(task=0), RouteContext(task=1)],
        "labels": [RouteContext(task=torch.arange(B) % 2)],
        "visible": [RouteContext(visible=(0, 1, 2, 3))],
        "restrict": [RouteContext(task=0), RouteContext(task=1)],
    }[mode]
    x = torch.randn(B, L, D)
    before = [layer(x, context, True)[0] for context in old]
    for p in layer.parameters():
        p.requires_grad_(False)
    new = layer.add_experts(2, tasks=[2])
    assert new == [len(layer.ids) - 2, len(layer.ids) - 1]
    optim = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    layer.train()
    for _ in range(3):
        optim.zero_grad()
        layer(x, RouteContext(task=2) if mode != "visible" else None, True)[0].square().sum().backward()
        optim.step()
    layer.eval()
    for context, y in zip(old, before, strict=True):
        assert torch.equal(layer(x, context, True)[0], y)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("router", ["topk2", "table"])
def test_weights_and_structure_survive_a_file(name, router):
    layer = make(name, router=router).double()
    layer.freeze([5])
    x = torch.randn(B, L, D, dtype=torch.float64)
    layer(x, RouteContext(task=1))
    file = io.BytesIO()
    torch.save({"structure": layer.structure(), "weights": layer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved["structure"])) == layer.structure()
    other = MAKERS[name](router=dict(ROUTERS[router])).double()
    other.restore_structure(saved["structure"])
    other.load_state_dict(saved["weights"])
    assert other.structure() == layer.structure()
    for task in range(3):
        a, b = (one.eval()(x, RouteContext(task=task), True)[0] for one in (layer, other))
        assert torch.equal(a, b)
    assert layer.add_experts(1, "copy", source=0) == other.add_experts(1, "copy", source=0)


@pytest.mark.parametrize("name", ["moa", "moh_shared"])
def test_a_split_changes_nothing_in_the_training(name):
    whole = make(name, added=False).double()
    split = copy.deepcopy(whole)
    optims = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in (whole, split)]

    def train(seeds):
        for seed, (layer, optim) in itertools.product(seeds, zip((whole, split), optims, strict=True)):
            x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optim.zero_grad()
            y, routing = layer(x)
            (y.square().mean() + sum(routing.aux.values())).backward()
            optim.step()

    train(range(3))
    migrate_optimizer(optims[1], split.freeze([2]) + split.thaw([2]))
    assert len(split.cohort_ids) == 2
    train(range(3, 6))
    x = torch.randn(B, L, D, dtype=torch.float64)
    torch.testing.assert_close(split(x)[0], whole(x)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MAKERS)
def test_heads_that_come_later(name):
    layer = MAKERS[name](router={"name": "task_table"})
    [same] = layer.add_experts(1, "copy", source=2)
    [zero] = layer.add_experts(1, "zero")
    x = torch.randn(B, L, D)
    for task, e in enumerate((2, same, zero)):
        layer.assign([e], task)
    y = [layer(x, RouteContext(task=t))[0] for t in range(3)]
    assert torch.equal(y[0], y[1])
    if isinstance(layer, MoA):
        assert y[2].abs().sum() == 0
        with pytest.raises(ValueError, match=r"hidden: expected the size \d of the keys of all heads, got 5"):
            layer.add_experts(1, hidden=5)
    else:  # what shared heads give stays
        layer.remove([zero])
        nobody = torch.full((B * L, 1), NONE)
        torch.testing.assert_close(y[2], layer(x, RouteContext(replay=nobody))[0])


@pytest.mark.parametrize("name", MAKERS)
def test_bf16_autocast_is_near_the_exact_output(name):
    for path in PATHS[name.partition("_")[0]]:
        if path == "grouped" and name == "moa_plain":
            continue
        layer = make(name, path, added=name != "moa_plain")
        x = torch.randn(B, L, D, requires_grad=True)
        exact, want = layer(x, None, True)
        with torch.autocast("cpu", torch.bfloat16):
            y, routing = layer(x, None, True)
        assert y.dtype == torch.bfloat16
        assert torch.equal(routing.ids, want.ids)
        torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)
        y.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        assert layer.to(torch.bfloat16)(x.detach().bfloat16(), None, True)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(0, L), (1, 1), (2, 0)])
def test_empty_batches_and_single_tokens(name, shape):
    layer = make(name)
    x = torch.randn(*shape, D, requires_grad=True)
    y, _ = layer(x, None, True)
    assert y.shape == x.shape
    y.sum().backward()


def test_a_sequence_of_padding_only_is_zero_and_has_finite_gradients():
    for name in MAKERS:
        layer = make(name)
        x = torch.randn(B, L, D, requires_grad=True)
        valid = torch.ones(B, L, dtype=torch.bool)
        valid[1] = False
        y, _ = layer(x, RouteContext(valid=valid))
        assert y[1].abs().sum() == 0
        assert y.isfinite().all()
        y.square().sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad[1].abs().sum() == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_parameters_and_operations_are_counted():
    moa = MoA(D, 6, S, router={"name": "topk", "k": 2})
    own = {"q": D * S + S, "o": S * D}
    beside = D * 2 * S + 2 * S + 6 * D
    assert moa.parameter_counts() == (6 * sum(own.values()) + beside, 2 * sum(own.values()) + beside)
    assert moa.flops_per_token() == 2 * (2 * 2 * D * S + D * 2 * S + 6 * D)
    moh = MoH(D, 6, S, shared=2, router={"name": "topk", "k": 3})
    own |= {"k": D * S + S, "v": D * S + S}
    beside = D + 6 * D + 2 * D + 2 * D + 2 * sum(own.values())  # bias, router, balance, share, shared heads
    keys = own["k"] + own["v"]
    assert moh.parameter_counts() == (6 * sum(own.values()) + beside, 6 * keys + 3 * (own["q"] + own["o"]) + beside)
    assert moh.flops_per_token() == 2 * (6 * D + 2 * D + 2 * D + 2 * 4 * D * S + 6 * 2 * D * S + 3 * 2 * D * S)


def test_dropout_acts_on_attention_weights_in_training_only():
    for name in MAKERS:
        layer = MAKERS[name](router={"name": "topk"}, dropout=0.5)
        x = torch.randn(B, L, D)
        assert not torch.equal(layer(x)[0], layer(x)[0])
        layer.eval()
        assert torch.equal(layer(x)[0], layer(x)[0])


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="heads: expected a divisor of dim 16, or a size, got 5"):
        MoA(D, 5)
    with pytest.raises(ValueError, match="heads: expected heads and shared to divide dim 16, or a size, got 5"):
        MoH(D, 3, shared=2)
    with pytest.raises(
        ValueError, match=r"dispatch: expected 'auto' or one of \('dense',\) for KeyedHeads, got 'loop'"
    ):
        MoH(D, 4, dispatch="loop")
    for router in ("soft", "smear"):
        with pytest.raises(ValueError, match="router: expected one that assigns tokens to heads, got"):
            MoA(D, 4, router=router)
    with pytest.raises(ValueError, match=r"expected \(B, L, D\), or packed tokens .* got \(6, 16\)"):
        make("moa")(torch.randn(L, D))
    with pytest.raises(ValueError, match="expert: expected one of \\['moa'\\], got 'ffn'"):
        make("moa").add_experts(1, expert="ffn")
    with pytest.raises(ValueError, match="only be in a layer MoA or MoH"):
        make("moa").cohorts["0"].every(torch.randn(2, D))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("router", ["topk1_after", "table"])
@pytest.mark.parametrize(("name", "path"), [(n, p) for n in ("moa", "moh", "moh_shared") for p in ("auto", "dense")])
def test_idle_heads_under_distributed_training(process_group, name, path, router):
    layer = make(name, path, router)
    wrapped = DistributedDataParallel(layer)
    for seed in range(3):
        layer.zero_grad()
        x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(seed))
        y, routing = wrapped(x, RouteContext(task=torch.tensor([seed])) if router == "table" else None)
        (y.square().sum() + sum(routing.aux.values())).backward()
    assert all(p.grad is not None for p in layer.parameters())
