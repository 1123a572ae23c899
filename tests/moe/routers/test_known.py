"""Routers and losses against formulas written out a second time, in numpy and float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from soft_moe_pytorch import SoftMoE

from cmoe.moe import MoELayer, RouteContext, losses
from cmoe.moe.routers.parts import capacity, select

DIM, TOKENS, EXPERTS = 6, 40, 5


def make(router, k_std=0.6, **options):
    torch.manual_seed(1)
    layer = MoELayer(DIM, 4, experts=EXPERTS, router={"name": router, **options}).double().eval()
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(k_std * torch.randn(p.shape))
    return layer


X = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
x = X.numpy()


def route(layer, **context):
    return layer.router(X, RouteContext(**context), layer.view)


def columns(layer, name="weight"):
    return getattr(layer.router.columns["0"], name).detach().numpy()


def dense(routing):
    out = np.zeros((TOKENS, EXPERTS))
    for t, (ids, weights) in enumerate(zip(routing.ids.tolist(), routing.weights.tolist(), strict=True)):
        for e, w in zip(ids, weights, strict=True):
            if e >= 0:
                out[t, e] = w
    return out


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best(s, k):
    mask = np.zeros_like(s, dtype=bool)
    np.put_along_axis(mask, np.argsort(-s, axis=1)[:, :k], True, axis=1)
    return mask


def mixtral(s, k):
    kept = np.where(best(s, k), s, -np.inf)
    return softmax(kept)


def cosine(layer, perturbation):
    p, w = layer.router.score.project.weight.detach().numpy(), columns(layer)
    h = x @ p.T
    h = h / (np.linalg.norm(h, axis=1, keepdims=True) + perturbation)
    w = w / (np.linalg.norm(w, axis=1, keepdims=True) + perturbation)
    return h @ w.T / max(np.exp(layer.router.score.log_temperature.item()), 0.01)


def distance(layer):
    mu, sigma = columns(layer), np.exp(columns(layer, "log_width"))
    d2 = ((x[:, None] - mu[None]) ** 2).sum(-1)
    return d2, sigma, columns(layer, "log_prior")


def gaussian(layer):
    d2, sigma, prior = distance(layer)
    return prior - DIM * np.log(sigma) - d2 / (2 * sigma**2)


def student(layer):
    d2, sigma, prior = distance(layer)
    nu = layer.router.nu
    return prior - DIM * np.log(sigma) - (nu + DIM) / 2 * np.log(1 + d2 / (nu * sigma**2))


def laplace(layer):
    d2, sigma, prior = distance(layer)
    return prior - np.sqrt(d2) / sigma


def quadratic(layer):
    u, v, w = columns(layer, "left"), columns(layer, "right"), columns(layer)
    forms = np.einsum("erd,erf->edf", u, v)
    return x @ w.T + np.einsum("td,edf,tf->te", x, forms, x)


def attention(layer):
    q, k, v = (x @ columns(layer, n).T for n in ("query", "key", "value"))
    a = softmax(q[:, :, None] * k[:, None, :])
    return (a * v[:, None, :]).sum(-1)


def nearest(layer):
    c = layer.router.columns["0"].centre.numpy()
    return -((x[:, None] - c[None]) ** 2).sum(-1)


def linear(layer):
    return x @ columns(layer).T


def two_levels(layer, groups, k):
    own, group = linear(layer), x @ columns(layer, "group").T
    edges = [EXPERTS * g // groups for g in range(groups + 1)]
    runs = list(itertools.pairwise(edges))
    gate = softmax(np.stack([group[:, a:b].mean(1) for a, b in runs], 1))
    out = np.zeros((TOKENS, EXPERTS))
    for t in range(TOKENS):
        g = int(gate[t].argmax())
        a, b = runs[g]
        inside = softmax(own[t, a:b])
        for e in np.argsort(-inside)[: min(k, min(q - p for p, q in runs))]:
            out[t, a + e] = gate[t, g] * inside[e]
    return out


def prototypes(layer, groups):
    s = linear(layer)
    out = np.zeros_like(s)
    for a, b in itertools.pairwise([EXPERTS * g // groups for g in range(groups + 1)]):
        p = softmax(s[:, a:b])
        out[:, a:b] = np.where(best(s[:, a:b], 1), p, 0) / groups
    return out


def deepseek(layer, k):
    s = 1 / (1 + np.exp(-linear(layer)))
    chosen = np.where(best(s + columns(layer, "bias"), k), s, 0)
    return chosen / chosen.sum(1, keepdims=True)


def top_p(layer, p):
    probs = softmax(linear(layer))
    out = np.zeros_like(probs)
    for t in range(TOKENS):
        total = 0.0
        for e in np.argsort(-probs[t]):
            out[t, e] = probs[t, e]
            total += probs[t, e]
            if total >= p:
                break
    return out


def null_experts(layer, k):
    everyone = np.concatenate([linear(layer), x @ layer.router.nulls.detach().numpy().T], 1)
    mask = best(everyone, k)[:, :EXPERTS]
    e = np.where(mask, np.exp(everyone[:, :EXPERTS]), 0)
    return e / np.maximum(e.sum(1, keepdims=True), 1e-300)


def thresholds(layer):
    w = columns(layer)
    c = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    margin = 1 / (1 + np.exp(-c)) - 1 / (1 + np.exp(-columns(layer, "threshold")))
    on = margin > 0
    on |= best(margin, 1) & ~on.any(1, keepdims=True)
    return on / on.sum(1, keepdims=True)


def expert_choice(layer, factor):
    p = softmax(linear(layer))
    each = int(np.ceil(factor * TOKENS / EXPERTS))
    return np.where(best(p.T, each).T, p, 0)


KNOWN = {
    "topk": (lambda: make("topk", k=3), lambda m: mixtral(linear(m), 3)),
    "topk after": (lambda: make("topk", order="after"), lambda m: np.where(best(linear(m), 2), softmax(linear(m)), 0)),
    "switch": (lambda: make("switch", capacity=0.0), lambda m: np.where(best(linear(m), 1), softmax(linear(m)), 0)),
    "dense": (lambda: make("dense"), lambda m: softmax(linear(m))),
    "gshard": (lambda: make("gshard", capacity=0.0), lambda m: mixtral(linear(m), 2)),
    "cosine": (lambda: make("cosine"), lambda m: np.where(best(cosine(m, 1e-6), 2), softmax(cosine(m, 1e-6)), 0)),
    "perturbed_cosine": (
        lambda: make("perturbed_cosine"), lambda m: np.where(best(cosine(m, 0.1), 2), softmax(cosine(m, 0.1)), 0)),
    "gaussian": (lambda: make("gaussian"), lambda m: mixtral(gaussian(m), 2)),
    "student_t": (lambda: make("student_t", nu=4.0), lambda m: mixtral(student(m), 2)),
    "laplace": (lambda: make("laplace"), lambda m: mixtral(laplace(m), 2)),
    "quadratic": (lambda: make("quadratic", rank=3), lambda m: mixtral(quadratic(m), 2)),
    "attention": (lambda: make("attention"), lambda m: mixtral(attention(m), 2)),
    "kmeans": (lambda: make("kmeans", k=2), lambda m: mixtral(nearest(m), 2)),
    "hierarchical": (lambda: make("hierarchical", groups=2, k=2), lambda m: two_levels(m, 2, 2)),
    "prototypes": (lambda: make("prototypes", groups=3), lambda m: prototypes(m, 3)),
    "top_p": (lambda: make("top_p", p=0.6), lambda m: top_p(m, 0.6)),
    "null_experts": (lambda: make("null_experts", k=3, null=3), lambda m: null_experts(m, 3)),
    "threshold": (lambda: make("threshold"), thresholds),
    "relu": (lambda: make("relu"), lambda m: np.maximum(linear(m), 0)),
    "expert_choice": (lambda: make("expert_choice", factor=1.5), lambda m: expert_choice(m, 1.5)),
    "base, not training": (lambda: make("base"), lambda m: np.where(best(linear(m), 1), 1 / (1 + np.exp(-linear(m))), 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_weights_are_those_of_the_formula(name):
    build, formula = KNOWN[name]
    layer = build()
    np.testing.assert_allclose(dense(route(layer)), formula(layer), rtol=1e-6, atol=1e-9)


def test_sigmoid_bias_chooses_with_the_bias_and_weighs_without():
    layer = make("sigmoid_bias", rate=0.05)
    layer.router.columns["0"].bias.copy_(torch.tensor([0.3, 0.0, -0.3, 0.1, 0.0]))
    np.testing.assert_allclose(dense(route(layer)), deepseek(layer, 2), rtol=1e-9)
    before = columns(layer, "bias").copy()
    load = best(1 / (1 + np.exp(-linear(layer))) + before, 2).sum(0)
    layer.train()
    route(layer)
    np.testing.assert_allclose(columns(layer, "bias") - before, 0.05 * np.sign(load.mean() - load), atol=1e-12)


def test_the_bias_evens_out_the_load():
    layer = make("sigmoid_bias", rate=0.02, k_std=1.0).train()
    first = np.bincount(route(layer).ids.flatten(), minlength=EXPERTS)
    for _ in range(200):
        routing = route(layer)
    last = np.bincount(routing.ids.flatten(), minlength=EXPERTS)
    assert last.std() < 0.3 * first.std()


def test_relu_holds_the_number_of_experts():
    layer = make("relu", k=2, rate=1.5, weight=0.01).train()
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        routing = route(layer)
        (routing.aux["l1"] + (2.0 - routing.weights.sum(1)).relu().mean()).backward()
        optimizer.step()
    assert 1.2 < (route(layer).ids >= 0).sum(1).double().mean() < 2.8


def test_the_auction_finds_the_best_assignment():
    for seed in range(5):
        scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        chosen = select.auction(scores, epsilon=1e-4)
        assert torch.bincount(chosen, minlength=5).tolist() == [6] * 5
        slots = np.repeat(scores.numpy(), 6, axis=1)
        rows, cols = linear_sum_assignment(-slots)
        assert scores.gather(1, chosen.unsqueeze(1)).sum().item() == pytest.approx(slots[rows, cols].sum(), abs=0.05)
    uneven = select.auction(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(uneven, minlength=3).max() <= 3


def test_sinkhorn_balances_rows_and_columns():
    scores = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = select.sinkhorn(scores, 200, 1e-9)
    torch.testing.assert_close(plan.sum(1), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 15.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    ratio = (plan.log() - scores).numpy()  # scores plus a number per row and one per column
    np.testing.assert_allclose(ratio - ratio[:, :1] - ratio[:1] + ratio[0, 0], 0, atol=1e-9)


@pytest.mark.parametrize("drop", ["order", "weight", "random"])
def test_capacity_leaves_out_whom_the_policy_says(drop):
    generator = torch.Generator().manual_seed(0)
    cols = torch.randint(0, 4, (50, 2), generator=generator)
    weights = torch.rand(50, 2, generator=generator)
    absent = torch.rand(50, 2, generator=generator) < 0.2
    late = capacity.over(cols, absent, weights, 4, 7, drop, generator)
    assert not (late & absent).any()
    for e in range(4):
        mine = [(t, k) for t in range(50) for k in range(2) if cols[t, k] == e and not absent[t, k]]
        out = [p for p in mine if late[p]]
        assert len(mine) - len(out) == min(7, len(mine))
        if drop == "order":
            assert out == mine[7:]
        if drop == "weight":
            assert set(out) == set(sorted(mine, key=lambda p: -weights[p])[7:])


def test_places_are_rounded_up():
    assert [capacity.places(f, 40, 5) for f in (1.0, 1.25, 1.01, 0.0)] == [8, 10, 9, 1]
    assert capacity.places(1.1, 100, 10) == 11  # 11.000000000000002 in float64


def test_hash_moves_few_tokens_when_an_expert_is_added():
    layer = MoELayer(DIM, 4, experts=4, router="hash").eval()
    ids = torch.arange(4000)
    tokens = torch.zeros(4000, DIM)
    before = layer.router(tokens, RouteContext(token_ids=ids), layer.view).ids[:, 0]
    counts = torch.bincount(before, minlength=4)
    assert (counts - 1000).abs().max() < 150
    (new,) = layer.add_experts(1)
    after = layer.router(tokens, RouteContext(token_ids=ids), layer.view).ids[:, 0]
    moved = before != after
    assert (after[moved] == new).all()
    assert 0.15 < moved.double().mean() < 0.25


def test_sparsemixer_samples_near_experts_and_takes_heuns_steps():
    """Drawn from the softmax over experts near the best; others than the best with a third of the weight in 3 of 4 cases,
    with the gradient of the whole weight."""
    layer = MoELayer(4, 4, experts=4, router={"name": "sparsemixer", "jitter": 0.15, "switch": 0.0}).double().train()
    with torch.no_grad():
        layer.router.columns["0"].weight.copy_(torch.eye(4))
    scores = torch.tensor([0.6, 0.5, 0.45, 0.2], dtype=torch.float64)  # 0.2 is more than 2 · 0.15 below 0.6
    x_TD = scores.expand(8000, 4).clone().requires_grad_()
    routing = layer.router(x_TD, RouteContext(generator=torch.Generator().manual_seed(0)), layer.view)
    drawn = routing.ids[:, 0]
    p = scores[:3].softmax(-1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4)[:3].double() / 8000, p, atol=0.02, rtol=0)
    assert not (drawn == 3).any()
    share = routing.weights[:, 0].detach() / p[drawn]
    torch.testing.assert_close(share[drawn == 0], torch.ones_like(share[drawn == 0]))
    others = share[drawn != 0]
    assert ((others - 1).abs() < 1e-9).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert ((others - 1 / 3).abs() < 1e-9).double().mean().item() == pytest.approx(0.75, abs=0.02)
    routing.weights.sum().backward()
    for e in range(3):
        jacobian = p[e] * (torch.eye(3, dtype=torch.float64)[e] - p)  # of softmax
        assert x_TD.grad is not None
        torch.testing.assert_close(x_TD.grad[drawn == e][:, :3], jacobian.expand(int((drawn == e).sum()), 3))
    layer.eval()
    routing = layer.router(x_TD, RouteContext(), layer.view)
    torch.testing.assert_close(routing.weights[:, 0], p[:1].expand(8000))


def test_losses_against_their_formulas():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(30, 4, generator=generator, dtype=torch.float64).softmax(-1)
    task = torch.randint(0, 3, (30,), generator=generator)
    p = probs.numpy()
    joint = np.stack([p[task.numpy() == m].sum(0) / 30 for m in range(3)])
    mi = sum(
        joint[m, e] * np.log(joint[m, e] / (joint[m].sum() * joint[:, e].sum())) for m in range(3) for e in range(4)
    )
    assert losses.mutual_information_loss(probs, task).item() == pytest.approx(-mi)
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    unit = w.numpy() / np.linalg.norm(w.numpy(), axis=1, keepdims=True)
    mean = np.mean([(unit[i] @ unit[j]) ** 2 for i in range(4) for j in range(4) if i != j])
    assert losses.orthogonality_loss([w[:1], w[1:]]).item() == pytest.approx(mean)
    a, b = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    pa, pb = softmax(a.numpy()), softmax(b.numpy())
    kl = 0.5 * ((pa * np.log(pa / pb)).sum(1) + (pb * np.log(pb / pa)).sum(1)).mean()
    assert losses.consistency_loss(a, b).item() == pytest.approx(kl)
    out = torch.randn(7, 3, 2, generator=generator, dtype=torch.float64)
    mask = torch.ones(7, 3, dtype=torch.bool)
    spread = ((out - out.mean(1, keepdim=True)) ** 2).mean().item()
    assert losses.mutual_distillation_loss(out).item() == pytest.approx(spread)
    assert losses.mutual_distillation_loss(out, mask).item() == pytest.approx(spread)
    absent = torch.rand(30, 2, generator=generator) < 0.3
    cols = torch.randint(0, 4, (30, 2), generator=generator)
    counts = np.bincount(cols.numpy()[~absent.numpy()], minlength=4)
    expected = 4 * (counts / counts.sum() * p.mean(0)).sum()
    assert losses.switch_loss(probs, cols, None, absent).item() == pytest.approx(expected)
    share = np.bincount(cols.numpy().flatten(), minlength=4) / 60
    share[1:] = share[1:].mean()  # AdaMoE: each null with the mean of all
    expected = 4 * (share * p.mean(0)).sum()
    assert losses.switch_loss(probs, cols, alike=3).item() == pytest.approx(expected)


def test_balance_losses_of_null_experts_and_of_gshard():
    layer = make("null_experts", k=3, null=2).train()
    scores = np.concatenate([linear(layer), x @ layer.router.nulls.detach().numpy().T], 1)
    probs, chosen = softmax(scores), np.argsort(-scores, 1)[:, :3]
    share = np.bincount(chosen.flatten(), minlength=EXPERTS + 2) / chosen.size
    share[EXPERTS:] = share[EXPERTS:].mean()
    wanted = 0.01 * (EXPERTS + 2) * (share * probs.mean(0)).sum()
    assert route(layer).aux["switch"].item() == pytest.approx(wanted)
    # GShard's algorithm 1 takes the loss before any second expert is drawn
    layer = make("gshard").train()
    probs = softmax(linear(layer))
    share = np.bincount(probs.argmax(1), minlength=EXPERTS) / TOKENS
    assert route(layer).aux["switch"].item() == pytest.approx(0.01 * EXPERTS * (share * probs.mean(0)).sum())


def gelu(h):
    return 0.5 * h * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))


def ffn(layer, tokens, merge=None):
    """(E, ..., D) of every expert of a layer on its own tokens (E, ..., D); with `merge` (E,) of one merged expert."""
    p = {name: q.detach().numpy() for name, q in layer.cohorts["0"].named_parameters()}
    if merge is not None:
        p = {name: np.tensordot(merge, q, 1)[None] for name, q in p.items()}
    h = gelu(
        np.einsum("e...d,edh->e...h", tokens, p["w1"]) + p["b1"].reshape(len(p["b1"]), *[1] * (tokens.ndim - 2), -1)
    )
    return np.einsum("e...h,eho->e...o", h, p["w2"]) + p["b2"].reshape(len(p["b2"]), *[1] * (tokens.ndim - 2), -1)


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_is_its_algorithm(slots):
    """Algorithm 1 with normed inputs and slot vectors and a scale, from the formulas of Puigcerver et al. 2023."""
    layer = make("soft", slots=slots)
    sequences = x.reshape(4, 10, DIM)
    phi = columns(layer).reshape(EXPERTS * slots, DIM)
    phi = layer.router.scale.item() * phi / np.linalg.norm(phi, axis=1, keepdims=True)
    scores = np.einsum("bld,sd->bls", sequences / np.linalg.norm(sequences, axis=2, keepdims=True), phi)
    dispatch, combine = softmax(scores.transpose(0, 2, 1)), softmax(scores)
    mixed = np.einsum("bsl,bld->bsd", dispatch, sequences).reshape(4, EXPERTS, slots, DIM).transpose(1, 0, 2, 3)
    outputs = ffn(layer, mixed).transpose(1, 0, 2, 3).reshape(4, EXPERTS * slots, DIM)
    y, _ = layer(X.view(4, 10, DIM))
    np.testing.assert_allclose(y.detach(), np.einsum("bls,bsd->bld", combine, outputs), atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_smear_is_the_expert_of_the_mean_weights(norm):
    layer = make("smear", norm=norm)
    sequences = x.reshape(4, 10, DIM)
    mean = sequences.mean(1)
    if norm == "layer":
        mean = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-5)
        mean = mean * layer.router.norm.weight.detach().numpy() + layer.router.norm.bias.detach().numpy()
    weights = softmax(mean @ columns(layer).T)
    expected = np.stack([ffn(layer, sequences[b][None], weights[b])[0] for b in range(4)])
    y, routing = layer(X.view(4, 10, DIM))
    np.testing.assert_allclose(routing.weights_GE.detach(), weights, atol=1e-12)
    np.testing.assert_allclose(y.detach(), expected, atol=1e-12)


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_moe_is_that_of_soft_moe_pytorch(slots):
    """The library norms its input first and both sides of the product to √D: our scale is then D."""
    block = SoftMoE(DIM, num_experts=EXPERTS, num_slots=slots, expert_mult=2).double()
    layer = MoELayer(DIM, 2 * DIM, experts=EXPERTS, router={"name": "soft", "slots": slots}).double()
    experts = block.experts.experts
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(0, 0.5)
        layer.router.scale.fill_(DIM)
        layer.router.columns["0"].weight.copy_(block.slot_embeds)
        for name, index in (("w1", 0), ("w2", 3)):
            layer.cohorts["0"].get_parameter(name).copy_(torch.stack([e[index].weight.mT for e in experts]))
            bias = "b" + name[1]
            layer.cohorts["0"].get_parameter(bias).copy_(torch.stack([e[index].bias for e in experts]))
    tokens = X.view(4, 10, DIM)
    valid = torch.arange(10) < torch.tensor([10, 7, 1, 4]).unsqueeze(1)
    for mask in (None, valid):
        expected = block(tokens, mask=mask)
        y, _ = layer(block.norm(tokens), RouteContext(valid=mask))
        if mask is not None:  # the library gives padding an output too
            expected = expected.masked_fill(~mask.unsqueeze(2), 0.0)
        torch.testing.assert_close(y, expected)
