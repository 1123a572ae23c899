"""Shared and fine-grained experts (DeepSeekMoE), residual MoE, and sizes that differ: no kind of their own."""

from __future__ import annotations

import pytest
import torch

from cmoe.moe import MoELayer, RouteContext

from .kinds import DIM, HIDDEN, UNITS, reference, spoken


def ffn(x, p):
    return reference.expert_output(x, "ffn", {"activation": "swiglu"}, p)


@pytest.mark.parametrize("path", ["auto", "loop", "bmm", "dense"])
@pytest.mark.parametrize(("fine", "k", "shared"), [(1, 1, 1), (4, 7, 1), (4, 6, 2)])
def test_deepseek_moe(path, fine, k, shared):
    """h = Σ shared FFN(x) + Σ top-k g FFN(x) with g of the softmax over all (Dai et al. 2024, equations 3 to 5)."""
    router = {"name": "topk", "k": k, "order": "after"}
    options = {"expert": {"name": "ffn", "activation": "swiglu", "bias": False}, "router": router, "dispatch": path}
    layer = spoken(MoELayer(DIM, HIDDEN // fine, experts=8 * fine - shared, shared=shared, **options)).double()
    x = torch.randn(UNITS, DIM, dtype=torch.float64)
    y, routing = layer(x)
    own = dict(layer.cohorts["0"].named_parameters())
    scores = (x @ layer.router.columns["0"].weight.T).softmax(1)
    best = scores.topk(k, 1)
    assert torch.equal(routing.ids, best.indices)
    expected = torch.zeros_like(x)
    width = HIDDEN // fine
    wide = dict(layer.shared.named_parameters())
    for i in range(shared):  # each of the shared experts for itself: its own part of the wide one
        part = slice(i * width, (i + 1) * width)
        gate, up = wide["w1"][0].chunk(2, 1)
        p = {"w1": torch.cat([gate[:, part], up[:, part]], 1), "w2": wide["w2"][0, part]}
        expected = expected + ffn(x, p)
    for e in range(8 * fine - shared):
        g = (scores * (best.indices == e).any(1, keepdim=True))[:, e : e + 1]
        expected = expected + g * ffn(x, {name: p[e] for name, p in own.items()})
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_finer_experts_cost_the_same():
    def layer(fine):
        router = {"name": "topk", "k": 2 * fine - 1}
        expert = {"name": "ffn", "bias": False}
        return MoELayer(64, 128 // fine, experts=8 * fine - 1, shared=1, router=router, expert=expert)

    counts, flops = [], []
    for fine in (1, 2, 4):
        routers = sum(p.numel() for p in layer(fine).router.parameters())
        counts.append([n - routers for n in layer(fine).parameter_counts()])
        flops.append(layer(fine).flops_per_token() - 2 * routers)
    assert counts[0] == counts[1] == counts[2] == [8 * 2 * 64 * 128, 2 * 2 * 64 * 128]
    assert flops == [2 * 2 * 2 * 64 * 128] * 3


def test_residual_moe():
    """A fixed expert corrected by one chosen of many (Rajbhandari et al. 2022, section on residual MoE)."""
    layer = spoken(MoELayer(DIM, HIDDEN, experts=4, shared=1, router={"name": "topk", "k": 1, "order": "after"}))
    x = torch.randn(UNITS, DIM)
    y, routing = layer(x)
    fixed = layer.shared.single(x, 0)
    chosen = torch.stack([layer.cohorts["0"].single(x[t : t + 1], int(e))[0] for t, e in enumerate(routing.ids[:, 0])])
    torch.testing.assert_close(y, fixed + routing.weights * chosen)
    layer.freeze(layer.ids)
    layer.add_experts(2)
    assert all(p.requires_grad for p in layer.shared.parameters())


def test_sizes_and_kinds_in_one_layer():
    """Experts of 4, 16 and 64 hidden units (HMoE, Wang et al. 2024) and one that is linear."""
    more = [
        {"experts": 2, "hidden": 4},
        {"experts": 1, "hidden": 64},
        {"experts": 1, "expert": {"name": "linear", "activation": "none"}},
    ]
    layer = spoken(MoELayer(DIM, 16, experts=3, router="task_table", more=more)).double()
    late = layer.add_experts(1, hidden=32)
    assert [cohort.hidden for cohort in layer.cohorts.values()] == [16, 4, 64, None, 32]
    x = torch.randn(UNITS, DIM, dtype=torch.float64)
    params = reference.leaves(layer)
    for task, ids in enumerate(([0], [3, 5], [6, 1, 4], late)):
        layer.assign(ids, task)
        outputs = reference.all_outputs(layer, x, params) if task < 3 else None
        y, _ = layer(x, RouteContext(task=task))
        mixed, _ = layer(x, RouteContext(task=torch.full((UNITS,), task)))
        torch.testing.assert_close(y, mixed, rtol=1e-12, atol=1e-12)
        if outputs is not None:
            torch.testing.assert_close(y, sum(outputs[e] for e in ids) / len(ids), rtol=1e-9, atol=1e-9)
    sizes = {"ffn": lambda h: 2 * DIM * h + h + DIM, "linear": DIM * DIM + DIM}
    total = 3 * sizes["ffn"](16) + 2 * sizes["ffn"](4) + sizes["ffn"](64) + sizes["linear"] + sizes["ffn"](32)
    assert layer.parameter_counts() == (total, 3 * sizes["ffn"](64))  # a task's three, were they the largest
    assert layer.flops_per_token() == 3 * 2 * 2 * DIM * 64
