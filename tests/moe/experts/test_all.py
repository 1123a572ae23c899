"""What holds for every kind of expert."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cmoe.moe import EXPERTS, MoELayer, ParameterChange, RouteContext, carry_state, migrate_optimizer
from cmoe.moe.experts import Expert
from cmoe.moe.routing import MergeRouting, SoftRouting
from cmoe.plugins.builtin import BUILTIN

from .kinds import DIM, FREE, HIDDEN, KINDS, UNITS, Fixed, layer_of, reference, spoken, units

EVERY = pytest.mark.parametrize("kind", KINDS)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def step(layer, optimizer, kind, context=None, seed=0):
    optimizer.zero_grad(set_to_none=False)  # a gradient of zero must not move what is frozen either
    y, routing = layer(units(kind, seed=seed), context)
    (y.square().mean() + sum(routing.aux.values())).backward()
    optimizer.step()


def rows(layer):
    """{(expert id, parameter name): its row}, for experts and router columns."""
    return {
        (expert, what, name): p.detach()[row].clone()
        for what, modules in zip(("expert", "router"), layer.stacked_modules(), strict=True)
        for key, module in modules.items()
        for name, p in module.named_parameters()
        for row, expert in enumerate(layer.cohort_ids[key])
    }


def test_every_kind_is_known_by_its_name_here_and_in_configurations():
    assert {spec["name"] for spec in KINDS.values()} == set(EXPERTS) == set(BUILTIN["expert"])
    for name, path in BUILTIN["expert"].items():
        assert f"{EXPERTS[name].__module__}:{EXPERTS[name].__name__}" == path


@EVERY
def test_what_a_kind_without_parameters_is(kind):
    assert bool(list(layer_of(kind).cohorts.parameters())) == (kind not in FREE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@EVERY
def test_frozen_experts_stay_bit_identical_and_the_others_learn(kind, optimizer):
    layer = layer_of(kind)
    optim = OPTIMIZERS[optimizer](layer.parameters())
    step(layer, optim, kind)
    migrate_optimizer(optim, layer.freeze([1, 2]))
    assert layer.frozen_ids == {1, 2}
    before = rows(layer)
    for seed in range(1, 6):
        step(layer, optim, kind, seed=seed)
    after = rows(layer)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (key[0] in (1, 2)), key


@EVERY
@pytest.mark.parametrize("how", ["migrate", "carry"])
def test_a_split_changes_nothing_in_the_training(kind, how):
    whole = layer_of(kind, dispatch="loop").double()
    split = copy.deepcopy(whole)
    optims = [OPTIMIZERS["adamw"](layer.parameters()) for layer in (whole, split)]

    def train(seeds):
        for seed in seeds:
            for layer, optim in zip((whole, split), optims, strict=True):
                optim.zero_grad()
                y, routing = layer(units(kind, seed=seed, dtype=torch.float64))
                (y.square().mean() + sum(routing.aux.values())).backward()
                optim.step()

    train(range(3))
    change = split.freeze([1]) + split.thaw([1]) + split.freeze([0, 3]) + split.thaw([0, 3])
    assert len(split.cohort_ids) == 3
    assert sorted(split.ids) == [0, 1, 2, 3]
    if how == "migrate":
        migrate_optimizer(optims[1], change)
    else:
        anew = OPTIMIZERS["adamw"](split.parameters())
        carry_state(optims[1], anew, change)
        optims[1] = anew
    held = {id(p) for group in optims[1].param_groups for p in group["params"]}
    assert held == {id(p) for p in split.parameters()}
    train(range(3, 6))
    left, right = rows(whole), rows(split)
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-9, atol=1e-12)


@EVERY
@pytest.mark.parametrize("mode", ["label", "visible"])
@pytest.mark.parametrize("dispatch", ["auto", "dense"])
def test_old_outputs_are_bit_identical_after_experts_were_added_and_trained(kind, mode, dispatch):
    layer = layer_of(kind, "task_table" if mode == "label" else "topk", dispatch=dispatch)
    layer.assign([0, 2], 0)
    old = RouteContext(task=0) if mode == "label" else RouteContext(visible=(0, 1, 2, 3))
    layer.eval()
    x = units(kind)
    y, routing = layer(x, old)
    layer.train()
    layer.freeze(layer.ids)
    new = layer.add_experts(2, tasks=[1])
    if any(p.requires_grad for p in layer.parameters()):
        optim = OPTIMIZERS["adamw"](layer.parameters())
        for seed in range(4):
            step(layer, optim, kind, RouteContext(task=1) if mode == "label" else None, seed)
    other = "constant" if kind not in ("conv", "separable") else kind
    layer.add_experts(1, expert=KINDS[other])
    layer.eval()
    y_after, after = layer(x, old)
    assert torch.equal(y, y_after)
    assert torch.equal(routing.ids, after.ids)
    with_new, _ = layer(x, RouteContext(task=1, visible=(*layer.ids[:4], *new)))
    assert kind in FREE or not torch.equal(with_new, y)


@EVERY
@pytest.mark.parametrize("router", ["topk", "task_table"])
def test_weights_and_structure_survive_a_file(kind, router):
    layer = layer_of(kind, router, more=[{"experts": 2, "expert": "copy"}, {"experts": 1, "expert": "zero"}]).double()
    layer.add_experts(3, tasks=[5], expert=KINDS[kind], hidden=4)  # another size, where it has one
    layer.freeze([1, 4])
    layer.remove([2, 6, 8])
    layer.assign([0, 3, 5], 6)
    spoken(layer)
    x = units(kind, dtype=torch.float64)
    for task in (5, 6):
        layer(x, RouteContext(task=task))
    file = io.BytesIO()
    torch.save({"structure": layer.structure(), "weights": layer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved["structure"])) == layer.structure()
    other = layer_of(kind, router, more=[{"experts": 2, "expert": "copy"}, {"experts": 1, "expert": "zero"}]).double()
    state = torch.get_rng_state()
    other.restore_structure(saved["structure"])
    assert torch.equal(torch.get_rng_state(), state)
    other.load_state_dict(saved["weights"])
    assert other.structure() == layer.structure()
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in layer.named_parameters()]
    for task in (5, 6):
        a, b = (one.eval()(x, RouteContext(task=task))[0] for one in (layer, other))
        assert torch.equal(a, b)
    assert layer.add_experts(1) == other.add_experts(1)
    assert layer.freeze([7]).removed != [] or kind in FREE
    assert layer.parameter_counts()[0] == sum(p.numel() for p in layer.parameters())


@EVERY
def test_initial_values_of_experts_that_come_later(kind):
    layer = layer_of(kind, "task_table")
    x = units(kind)
    [most] = layer.add_experts(1, "copy", source=2)
    [fresh] = layer.add_experts(1)
    for task, expert in enumerate((2, most, fresh)):
        layer.assign([expert], task)
    y = [layer(x, RouteContext(task=task))[0] for task in range(3)]
    torch.testing.assert_close(y[0], y[1])
    assert kind in FREE or not torch.allclose(y[2], y[0])
    if kind in ("copy", "constant"):
        with pytest.raises(ValueError, match="init: zero is not possible for experts of kind"):
            layer.add_experts(1, "zero")
        return
    [zero] = layer.add_experts(1, "zero")
    layer.assign([zero], 3)
    y_zero = layer(x, RouteContext(task=3))[0]
    assert torch.equal(y_zero, torch.zeros_like(y_zero))
    if kind not in FREE:
        y_zero.sum().backward()
        cohort = layer.cohorts[layer.view.where[zero][0]]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in cohort.parameters())  # and it can learn


@EVERY
def test_dropout_acts_in_training_only(kind):
    if kind in (*FREE, "constant"):
        with pytest.raises(TypeError, match="dropout"):
            MoELayer(DIM, expert={**KINDS[kind], "dropout": 0.5})
        return
    layer = spoken(MoELayer(DIM, HIDDEN, expert={**KINDS[kind], "dropout": 0.5}))
    x = units(kind)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    plain = spoken(MoELayer(DIM, HIDDEN, expert=KINDS[kind]))
    plain.load_state_dict(layer.state_dict())
    layer.eval()
    torch.testing.assert_close(layer(x)[0], plain.eval()(x)[0])
    layer.train()
    with torch.no_grad():
        many = torch.stack(
            [layer(x, RouteContext(replay=torch.zeros(UNITS, 1, dtype=torch.int64)))[0] for _ in range(400)]
        )
        layer.eval()
        alone = layer(x, RouteContext(replay=torch.zeros(UNITS, 1, dtype=torch.int64)))[0]
    if kind in ("adapter", "lora", "linear", "ffn"):  # what follows dropout is linear: the mean is the output without
        assert float((many.mean(0) - alone).abs().max()) < 5 * float(many.std(0).max()) / 20


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (*FREE, "constant", "lora")])
def test_without_bias(kind):
    layer = MoELayer(DIM, HIDDEN, expert={**KINDS[kind], "bias": False})
    assert {p.dim() for p in layer.cohorts.parameters()} <= {3, 5}
    assert {p.dim() for p in layer_of(kind).cohorts.parameters()} & {2}
    x = units(kind)
    assert layer(torch.zeros_like(x))[0].abs().sum() == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FREE])
def test_init_is_respected(kind):
    torch.manual_seed(3)
    layers = {
        init: MoELayer(64, 64, experts=8, expert={**KINDS[kind], "init": init})
        for init in ("uniform", "xavier", "normal")
    }

    def first(layer):
        cohort = layer.cohorts["0"]
        return next(p for name, p in cohort.named_parameters() if p.dim() > 2)

    stds = {init: float(first(layer).detach().std()) for init, layer in layers.items()}
    shape = first(layers["normal"]).shape[1:]
    if kind == "separable":  # each channel by itself
        fan_in = fan_out = 9
        fan_out = 64 * 9
    elif kind == "conv":
        fan_in = fan_out = 64 * 9
    else:
        fan_in, fan_out = shape
    assert stds["normal"] == pytest.approx(0.02, rel=0.05)
    assert stds["uniform"] == pytest.approx((1 / fan_in) ** 0.5 / 3**0.5, rel=0.05)
    assert stds["xavier"] == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05)
    with pytest.raises(ValueError, match="init: expected 'uniform', 'xavier' or 'normal', got 'he'"):
        MoELayer(64, expert={**KINDS[kind], "init": "he"})


@EVERY
def test_parameters_and_operations_are_counted(kind):
    layer = layer_of(kind, {"name": "topk", "k": 2})
    weights = {  # in one expert
        "ffn": (DIM * 2 * HIDDEN + HIDDEN * DIM, 2 * HIDDEN + DIM),
        "linear": (DIM * DIM, DIM),
        "lora": (2 * DIM * 4, 0),
        "adapter": (2 * DIM * 5, 5 + DIM),
        "conv": (2 * 9 * DIM * HIDDEN, HIDDEN + DIM),
        "separable": (9 * DIM + 2 * DIM * HIDDEN, DIM + HIDDEN + DIM),
        "zero": (0, 0),
        "copy": (0, 0),
        "constant": (3 * DIM, 0),
    }
    matrices, vectors = weights[kind]
    one, columns = matrices + vectors, 4 * DIM
    assert layer.parameter_counts() == (4 * one + columns, 2 * one + columns)
    assert layer.flops_per_token() == 2 * (2 * matrices + columns)
    assert layer.flops_for_all() == 2 * columns
    wide = layer_of(kind, {"name": "topk", "k": 2}, shared=2, base=torch.nn.Linear(DIM, DIM))
    together = matrices if kind != "separable" else 9 * DIM + 2 * DIM * HIDDEN
    assert wide.flops_for_all() == 2 * (columns + 2 * together + DIM * DIM)


@EVERY
def test_bf16_autocast_is_near_the_exact_output_and_learns(kind):
    layer = layer_of(kind, {"name": "topk", "k": 2})
    x = units(kind).requires_grad_()
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@EVERY
def test_padding_gives_zero_and_no_gradient(kind):
    layer = layer_of(kind, shared=1)
    x = units(kind).requires_grad_()
    valid = torch.arange(UNITS) % 3 != 0
    y, _ = layer(x, RouteContext(valid=valid))
    assert y[~valid].abs().sum() == 0
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[~valid].abs().sum() == 0
    assert kind == "zero" or x.grad[valid].abs().sum() > 0


@EVERY
def test_shared_experts_are_added_with_weight_one(kind):
    layer = layer_of(kind, Fixed, shared=2)
    shared = layer.shared
    assert isinstance(shared, Expert)
    x = units(kind)
    nobody = torch.full((UNITS, 1), -1)
    layer.router.routing = type(layer_of(kind)(x)[1])(nobody, torch.zeros(UNITS, 1))
    y, _ = layer(x)
    if kind == "zero":
        assert y.abs().sum() == 0
        return
    own = dict(shared.named_parameters())
    spec = KINDS[kind]
    x64 = x.double()
    expected = sum(
        reference.expert_output(x64, spec["name"], spec, {n: p[row].double() for n, p in own.items()})
        for row in range(shared.n)
    )
    if kind in ("ffn", "conv"):  # two of them are one of twice the hidden units
        assert (shared.n, shared.hidden) == (1, 2 * HIDDEN)
    else:
        assert shared.n == 2
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_slots_and_merged_experts(kind):
    """Routing that assigns nothing (Soft MoE, SMEAR) works with every kind, on maps too."""
    layer = layer_of(kind, Fixed, experts=3).double()
    x = units(kind, 10, dtype=torch.float64)
    own = reference.leaves(layer)
    view = layer.view
    generator = torch.Generator().manual_seed(1)
    give, take = (torch.rand(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    layer.router.routing = SoftRouting(give, take, 2, view.ids)
    y, _ = layer(x)
    groups = x.unflatten(0, (2, 5))
    slots = torch.einsum("gls,gl...->gs...", give, groups)
    each = [reference.all_outputs(layer, slots[:, 2 * e : 2 * e + 2].flatten(0, 1), own)[e] for e in range(3)]
    out = torch.cat([o.unflatten(0, (2, 2)) for o in each], 1)
    torch.testing.assert_close(y, torch.einsum("gls,gs...->gl...", take, out).flatten(0, 1), rtol=1e-9, atol=1e-9)

    weights = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    for group in (torch.tensor([0] * 5 + [1] * 5), torch.tensor([0] * 3 + [1] * 7), None):
        layer.router.routing = MergeRouting(weights if group is not None else weights[:1], group, 10, view.ids)
        y, _ = layer(x)
        params, spec = dict(layer.cohorts["0"].named_parameters()), KINDS[kind]
        for g in range(1 if group is None else 2):
            merged = {n: torch.einsum("e,e...->...", weights[g], p) for n, p in params.items()}
            mine = slice(None) if group is None else group == g
            expected = reference.expert_output(x[mine], spec["name"], spec, merged)
            torch.testing.assert_close(y[mine], expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def process_group(tmp_path):
    """A group of one process: the exchange of gradients waits for every parameter as it does with many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@EVERY
def test_idle_experts_under_distributed_training(process_group, kind):
    layer = layer_of(kind, {"name": "topk", "k": 1, "order": "after"}, more=[{"experts": 2, "expert": "zero"}])
    layer.add_experts(2)
    layer.freeze([5])
    wrapped = DistributedDataParallel(layer)
    for seed in range(3):
        layer.zero_grad()
        y, routing = wrapped(units(kind, 1, seed=seed))
        (y.square().sum() + sum(routing.aux.values())).backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@EVERY
def test_gradients_of_gradients(kind):
    layer = layer_of(kind, {"name": "topk", "k": 2}, dispatch="loop", experts=2).double()
    if kind in FREE:
        layer.add_experts(1, expert="constant")
    x = units(kind, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: layer(v)[0].square().sum(), (x,), atol=1e-5)


def test_a_callers_writing_into_the_output_leaves_the_input_alone():
    layer = layer_of("copy", "task_table").eval()
    x = units("copy")
    before = x.clone()
    with torch.no_grad():
        y, _ = layer(x, RouteContext(task=0))
        y.add_(1.0)
    assert torch.equal(x, before)


def test_kinds_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="expected one that works on tokens, got Conv: feature maps"):
        layer_of("ffn").add_experts(1, expert="conv")
    for kind in ("copy", "constant"):
        with pytest.raises(ValueError, match=f"{kind}: expected an output of the input's size 8, got 24"):
            MoELayer(DIM, out_dim=24, expert=kind)
    with pytest.raises(
        ValueError, match=r"dispatch: expected 'auto' or one of \('loop', 'bmm', 'dense'\) for Conv, got 'gr"
    ):
        layer_of("conv", dispatch="grouped")
    with pytest.raises(ValueError, match=r"conv: kernel: expected an odd number.* got 4"):
        MoELayer(DIM, expert={"name": "conv", "kernel": 4})
    with pytest.raises(ValueError, match="conv: activation: expected one of"):
        MoELayer(DIM, expert={"name": "conv", "activation": "swiglu"})
    with pytest.raises(ValueError, match="lora: rank: expected at least 1, got 0"):
        MoELayer(DIM, expert={"name": "lora", "rank": 0})
    with pytest.raises(ValueError, match="adapter: bottleneck: expected at least 1, got 0"):
        MoELayer(DIM, expert={"name": "adapter", "bottleneck": 0})


def test_the_change_of_an_optimizer_without_any_parameter_is_empty():
    layer = layer_of("copy", "task_table")
    assert not layer.freeze([1])
    assert layer.frozen_ids == {1}
    assert layer.cohort_ids == {"0": (0, 2, 3), "1": (1,)}
    layer.remove([0])
    assert layer.ids == (2, 3, 1)
    assert not ParameterChange() + layer.thaw([1])
