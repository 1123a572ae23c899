"""The layer under what surrounds it in training: torch.compile, other processes, activation checkpointing, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cmoe.moe import MoA, MoELayer, RouteContext

DIM, TOKENS = 16, 40


def layer_for(router="topk", **options):
    torch.manual_seed(0)
    return MoELayer(DIM, 32, experts=4, router=router, **options)


def gradients(layer, run, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # for noise
    y, routing = run(x)
    (y.square().sum() + sum(routing.aux.values())).backward()
    return {"x": x.grad, "y": y.detach(), **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("router", "path"), [("topk", "auto"), ("switch", "dense"), ("sigmoid_bias", "grouped")])
def test_one_graph_without_breaks(router, path):
    """Nothing in the layer waits for the host or asks it: row counts stay on the device."""
    eager, x = layer_for(router, dispatch=path), torch.randn(TOKENS, DIM)
    expected = gradients(eager, eager, x)
    torch._dynamo.reset()
    layer = layer_for(router, dispatch=path)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mine = gradients(layer, compiled, x)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert layer.usage == eager.usage


def test_added_experts_are_compiled_anew():
    layer, x = layer_for(dispatch="dense"), torch.randn(TOKENS, DIM)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x)
    layer.add_experts(2)
    layer.eval()
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("options", [{}, {"shared": 1}, {"expert": {"name": "ffn", "activation": "swiglu"}}])
@pytest.mark.parametrize("path", ["auto", "loop", "bmm", "dense"])
def test_recomputation_changes_nothing(path, options):
    x = torch.randn(TOKENS, DIM)
    kept, again = (layer_for("noisy_topk", dispatch=path, recompute=flag, **options) for flag in (False, True))
    found = [gradients(layer, layer, x) for layer in (kept, again)]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert kept.usage == again.usage


def test_a_checkpointed_block_around_the_layer():
    layer, x = layer_for(), torch.randn(TOKENS, DIM)
    plain = gradients(layer, layer, x)
    around = gradients(layer, lambda v: checkpoint(layer, v, use_reentrant=False), x)
    for name, value in plain.items():
        torch.testing.assert_close(around[name], value, msg=name)


def test_recomputation_keeps_less():
    def kept(recompute):
        layer = MoELayer(DIM, 512, experts=4, recompute=recompute)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() if tensor.shape[-1] == 512 and tensor.dim() == 2 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(TOKENS, DIM, requires_grad=True))
        return total

    sizes = [kept(False), kept(True)]
    assert sizes[0] > 0
    assert sizes[1] == 0


def test_deterministic_algorithms_are_enough():
    layer, x = layer_for(), torch.randn(TOKENS, DIM)
    torch.use_deterministic_algorithms(True)
    try:
        a, b = gradients(layer, layer, x), gradients(layer, layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture
def process_group(tmp_path):
    """A group of one process: the exchange of gradients waits for every parameter as it does with many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("router", [{"name": "topk", "k": 1, "order": "after"}, {"name": "relu", "k": 1}])
@pytest.mark.parametrize("more", [[], [{"experts": 1, "hidden": 4}]])
def test_idle_experts_under_distributed_training(process_group, router, more):
    """Experts and whole cohorts without a token take part: else the second step would find a gradient missing."""
    layer = MoELayer(DIM, 8, experts=6, router=router, more=more)
    layer.add_experts(2)
    wrapped = DistributedDataParallel(layer)
    for step in range(3):
        layer.zero_grad()
        y, routing = wrapped(torch.randn(1, DIM, generator=torch.Generator().manual_seed(step)))
        (y.square().sum() + sum(routing.aux.values())).backward()
    assert all(p.grad is not None for p in layer.parameters())


UNSEEN = {
    "one task's": ({"name": "task_table"}, RouteContext(task=1)),
    "one task's, labels": ({"name": "task_table"}, RouteContext(task=torch.ones(5, dtype=torch.int64))),
    "restricted": ({"name": "topk", "restrict": "task"}, RouteContext(task=1)),
    "restricted, labels": ({"name": "topk", "restrict": "task"}, RouteContext(task=torch.ones(5, dtype=torch.int64))),
    "visible": ({"name": "topk"}, RouteContext(visible=(1, 2))),
    "dense": ({"name": "dense"}, RouteContext(visible=(1, 2))),
    "soft": ({"name": "soft"}, RouteContext(visible=(1, 2), sequence=torch.zeros(5, dtype=torch.int64))),
    "smear": ({"name": "smear"}, RouteContext(visible=(1, 2), sequence=torch.zeros(5, dtype=torch.int64))),
    "dropout": ({"name": "topk", "expert_dropout": 0.9, "k": 1}, RouteContext()),
    "second stage": ({"name": "stable_moe"}, RouteContext(stage=1)),
    "noise of one": ({"name": "noisy_topk", "k": 1}, RouteContext(visible=(1,))),
    "per task": ({"name": "per_task"}, RouteContext(task=1, visible=(1,))),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNSEEN)
@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_what_a_batch_may_not_see_under_distributed_training(process_group, case, kind):
    """Whole cohorts and their columns: their gradients come too, as zeros, and the others are those without processes."""
    router, context = UNSEEN[case]
    if kind == "attention" and case in ("soft", "smear"):
        pytest.skip("attention takes only routers that assign tokens")

    def build():
        torch.manual_seed(0)
        if kind == "attention":
            layer = MoA(DIM, heads=3, size=4, router=router)
        else:
            layer = MoELayer(DIM, 8, experts=3, router=router)
        layer.add_experts(2)
        layer.assign([1, 2], 1)
        return layer

    def step(run, seed):
        torch.manual_seed(seed)
        y, routing = run(torch.randn(1, 5, DIM), context)
        (y.square().sum() + sum(routing.aux.values())).backward()

    layer, plain = build(), build()
    wrapped = DistributedDataParallel(layer)
    for seed in range(3):
        layer.zero_grad()
        step(wrapped, seed)
    assert all(p.grad is not None for p in layer.parameters())
    dist.destroy_process_group()
    try:
        step(plain, 2)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for (name, p), q in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if q.grad is None else q.grad, msg=name)


@pytest.mark.parametrize("router", ["topk", "task_table"])
@pytest.mark.parametrize("path", ["auto", "loop", "dense"])
def test_mutual_distillation_with_recomputation_and_with_one_task(router, path):
    x = torch.randn(TOKENS, DIM)
    kept, again = (layer_for(router, dispatch=path, distillation=0.5, recompute=flag) for flag in (False, True))
    found = []
    for layer in (kept, again):
        layer.assign([0, 2, 3], 1)
        found.append(gradients(layer, lambda v, layer=layer: layer(v, RouteContext(task=1)), x))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    _, routing = kept(x, RouteContext(task=1))
    assert "expert_distillation" in routing.aux
    if router == "task_table":  # a label for each token says the same
        _, labels = kept(x, RouteContext(task=torch.ones(TOKENS, dtype=torch.int64)))
        assert torch.equal(routing.aux["expert_distillation"], labels.aux["expert_distillation"])
