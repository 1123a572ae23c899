"""From dense to experts and back: the same function, the same optimizer state, and a way to save it."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from timm.layers import ConvMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

from cmoe.moe import MoELayer, RouteContext, migrate_optimizer, surgery
from cmoe.moe.surgery import Bare, Dense, dense_networks, layer_of, recognise
from cmoe.moe.surgery.split import clusters


def vit(**options):
    torch.manual_seed(0)
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "depth": 3,
        "embed_dim": 24,
        "num_heads": 2,
        "in_chans": 1,
        "num_classes": 5,
    }
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options)).double()


def convnext(name="convnext_atto"):
    torch.manual_seed(0)
    model = timm.create_model(
        name, in_chans=1, num_classes=5, depths=(1, 1, 2, 1), dims=(8, 8, 12, 8), patch_size=1
    ).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("gamma"):  # 1e-6 at the start: nobody would see what the networks do
                p.fill_(0.7)
    return model


class Llama(nn.Module):
    """Gated networks between norms, by the names that transformers uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

        config = LlamaConfig(hidden_size=16, intermediate_size=20, num_attention_heads=2)
        self.stem = nn.Conv2d(1, 16, 8, 8)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.LayerNorm(16), "mlp": LlamaMLP(config)}) for _ in range(2)]
        )
        self.double()

    def forward(self, x):
        h = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            h = h + layer["mlp"](layer["norm"](h))
        return h.mean(1)


MODELS = {
    "vit": vit,
    "vit, SwiGLU": lambda: vit(mlp_layer=SwiGLUPacked),
    "vit, dropout": lambda: vit(proj_drop_rate=0.3),
    "convnext, convolutions": convnext,
    "convnext, linear": lambda: convnext("convnext_tiny"),
    "llama": Llama,
    "sequential": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(256, 8), nn.SiLU(), nn.Linear(8, 6))
    ).double(),
}
IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("router", ["topk", {"name": "topk", "k": 1}, "dense", "task_table"])
def test_copies_are_the_dense_network(name, dtype, router):
    model = MODELS[name]().to(dtype).eval()
    x = IMAGES.to(dtype)
    before = model(x)
    count = len(dense_networks(model))
    done = surgery.upcycle(model, 3, router)
    found = surgery.layers(model)
    assert len(found) == count == len(done.events) > 0
    assert all(len(layer.ids) == 3 and not layer.training for layer in found.values())
    assert all(p.dtype == dtype for p in model.parameters())
    with surgery.routings(model, RouteContext(task=1)) as decided:
        after = model(x)
    assert (after - before).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-6)
    assert set(decided.by_layer()) == set(found)
    assert done.new == {layer: [0, 1, 2] for layer in found}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_split_sums_up_to_the_dense_network(name):
    model = MODELS[name]().eval()
    before = model(IMAGES)
    surgery.upcycle(model, 2, split=True)
    assert (model(IMAGES) - before).abs().max() <= 1e-12
    for layer in surgery.layers(model).values():
        w1 = layer.cohorts["0"].w1
        assert w1.shape[0] == 2
        assert not torch.equal(w1[0], w1[1])


def test_few_of_many_parts_are_nearer_the_network_than_others():
    """With centres as router columns, asking half of the experts beats asking a random half."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(8, 16)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    with torch.no_grad():  # units in groups, as trained networks have them
        network[0].weight.copy_(centres.repeat_interleave(8, 0) + 0.3 * torch.randn(64, 16))
        network[0].bias.fill_(-3.0)
    x = torch.randn(500, 16) + centres[torch.randint(0, 8, (500,))]
    errors = []
    for scale in (1.0, -1.0):  # the other way round: those that fit least
        layer, _ = layer_of(network, 8, {"name": "topk", "k": 2, "order": "before"}, split=True)
        with torch.no_grad():
            layer.router.columns["0"].weight.mul_(scale * 1e-3 / 0.02)  # nearly equal weights, as the scale supposes
        errors.append(float((layer(x)[0] - network(x)).detach().norm() / network(x).detach().norm()))
    assert errors[0] < 0.5 < errors[1]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_clusters_are_balanced_and_find_what_is_there(k):
    g = torch.Generator().manual_seed(k)
    truth = torch.arange(24) % k
    x = torch.nn.functional.one_hot(truth, k).double() * 5 + 0.1 * torch.randn(24, k, generator=g, dtype=torch.float64)
    members, centre = clusters(x, k, g)
    assert members.shape == (k, 24 // k)
    assert sorted(members.flatten().tolist()) == list(range(24))
    assert all(len({int(truth[i]) for i in row}) == 1 for row in members)
    assert centre.shape == (k, k)
    same, _ = clusters(torch.ones(6, 2), 3, g)  # nothing to tell them apart by
    assert sorted(same.flatten().tolist()) == list(range(6))


# -- what is recognised --------------------------------------------------------------------------------------------------


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Functional(Mlp):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.2, self.training)


FORMS = {
    "gelu": (lambda: Mlp(8, 12), {"activation": "gelu"}),
    "gelu, dropout": (lambda: Mlp(8, 12, drop=(0.1, 0.2)), {"activation": "gelu", "dropout": 0.1}),
    "relu, one bias": (lambda: Mlp(8, 12, act_layer=nn.ReLU, bias=(True, False)), {"activation": "relu"}),
    "tanh approximation": (lambda: Mlp(8, 12, act_layer=lambda: nn.GELU("tanh")), {"activation": "gelu_tanh"}),
    "convolutions": (lambda: ConvMlp(8, 12, act_layer=nn.SiLU), {"activation": "silu"}),
    "packed": (lambda: SwiGLUPacked(8, 12, bias=False), {"activation": "swiglu", "bias": False}),
    "gate last": (lambda: GluMlp(8, 12, act_layer=nn.GELU), {"activation": "geglu"}),
    "apart": (lambda: SwiGLU(8, 12), {"activation": "swiglu"}),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 5)),
        {"dropout": 0.3},
    ),
    "one map": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.2)),
        {"name": "linear", "dropout": 0.2},
    ),
    "norm": (lambda: Mlp(8, 12, norm_layer=nn.LayerNorm), None),
    "response norm": (lambda: GlobalResponseNormMlp(8, 12), None),
    "residual": (lambda: Residual(8, 12), None),
    "unknown activation": (lambda: Mlp(8, 12, act_layer=nn.Mish), None),
    "sigmoid gate": (lambda: GluMlp(8, 12), None),
    "hidden dropout of inputs": (
        lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)),
        None,
    ),
    "dropout by function": (lambda: Functional(8, 12), None),
    "norm in a row": (lambda: nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 8)), None),
    "three maps": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        None,
    ),
    "no network": (lambda: nn.LayerNorm(8), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_network_is_what_it_computes(name):
    make, wanted = FORMS[name]
    network, random = make(), torch.get_rng_state()
    before = copy.deepcopy(network.state_dict())
    form = recognise(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    if wanted is None:
        assert form is None
        with pytest.raises(ValueError, match="known form"):
            layer_of(network)
        return
    assert form is not None
    assert form.expert.items() >= wanted.items()
    x = torch.randn(9, 8)
    network.eval()
    y = network(x[:, :, None, None]).flatten(1) if form.channels_first else network(x)
    torch.testing.assert_close(form.make().eval().single(x, 0), y)


@pytest.mark.parametrize("name", ["gelu, dropout", "sequential"])
def test_dropout_drops_where_it_did(name):
    """As many hidden units are dropped while training, and the outputs behind it."""
    network = nn.Sequential(FORMS[name][0]())
    p = FORMS[name][1]["dropout"]
    surgery.upcycle(network, 1, {"name": "topk", "k": 1})
    bare = network[0]
    assert isinstance(bare, Bare)
    x = torch.randn(400, 8)
    with torch.no_grad():
        cohort = bare.layer.cohorts["0"]
        cohort.w2.fill_(1.0)
        hidden = cohort.compute(x, lambda h, w, b: h @ w[0] if w is cohort.w1 else h, *cohort.stacked())
    assert abs(float((hidden == 0).float().mean()) - p) < 0.05
    lost = float((network(x) == 0).float().mean())
    assert abs(lost - (0.2 if name == "gelu, dropout" else 0.0)) < 0.05


# -- where -----------------------------------------------------------------------------------------------------------------


def test_where_experts_come_can_be_said():
    for where, count in (
        ("blocks.1.mlp", 1),
        ("blocks.*", 3),
        (["blocks.0.mlp", "blocks.2.*"], 2),
        (lambda n, m: "1" in n, 1),
    ):
        model = vit()
        done = surgery.upcycle(model, 2, where=where)
        assert len(done.events) == len(surgery.layers(model)) == count
    with pytest.raises(ValueError, match=r"where: expected feed-forward networks among .*'blocks.9.mlp'"):
        surgery.upcycle(vit(), where=["blocks.9.mlp"])
    with pytest.raises(ValueError, match="share equally, got 96"):
        surgery.upcycle(vit(), 5, split=True)


def test_a_network_that_stands_in_several_places_stays_one():
    shared = Mlp(8, 12)
    model = nn.ModuleDict({"a": shared, "b": shared})
    surgery.upcycle(model, 2)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], Bare)


# -- hearing what bare layers decide ---------------------------------------------------------------------------------------


def test_auxiliary_losses_of_bare_layers_reach_the_router():
    model = vit()
    surgery.upcycle(model, 4, {"name": "topk", "k": 1, "switch": 0.1, "z": 0.01})
    model.train()
    with surgery.routings(model) as decided:
        model(IMAGES)
    assert len(decided.heard) == 3
    total = sum(v for _, routing in decided.heard for v in routing.aux.values())
    torch.testing.assert_close(decided.loss(), total)
    assert set(decided.auxiliary()) == {"switch", "z"}
    decided.loss().backward()
    for layer in surgery.layers(model).values():
        assert layer.router.columns["0"].weight.grad.abs().sum() > 0
    heard = len(decided.heard)
    model(IMAGES)  # nobody listens
    assert len(decided.heard) == heard
    with surgery.routings(model), pytest.raises(RuntimeError, match="nobody listens"), surgery.routings(model):
        pass
    with surgery.routings(model.eval()) as decided:
        model(IMAGES)
    assert float(decided.loss()) == 0.0


def test_what_a_router_remembers_goes_to_the_next_layer():
    model = vit()
    surgery.upcycle(model, 2, "recurrent")
    with surgery.routings(model) as decided:
        model(IMAGES)
    states = [routing.state for _, routing in decided.heard]
    assert decided.context is not None
    assert decided.context.state is states[-1]
    alone = model.blocks[1].mlp.layer
    seen = surgery.observe(model.eval(), lambda: model(IMAGES))
    different = alone.route(seen["blocks.1.mlp.layer"].tokens).logits
    with surgery.routings(model) as again:
        model(IMAGES)
    assert not torch.allclose(again.by_layer()["blocks.1.mlp.layer"].logits, different)


# -- optimizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "vit, SwiGLU", "convnext, convolutions", "llama"])
@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_copies_go_on_with_the_networks_optimizer_state(name, kind):
    """With one expert, training after upcycling is training without it."""
    dense = MODELS[name]()
    model = copy.deepcopy(dense)
    make = {
        "adam": lambda p: torch.optim.AdamW(p, 1e-3),
        "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    }[kind]
    optimizers = [make(dense.parameters()), make(model.parameters())]

    def step(one, optimizer):
        optimizer.zero_grad()
        one(IMAGES).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        for one, optimizer in zip((dense, model), optimizers, strict=True):
            step(one, optimizer)
    done = surgery.upcycle(model, 1, {"name": "topk", "k": 1, "switch": 0.0})
    migrate_optimizer(optimizers[1], done.change, added=model.parameters())
    held = [p for group in optimizers[1].param_groups for p in group["params"]]
    assert set(held) == set(model.parameters())
    assert len(held) == len(set(held))
    for _ in range(3):
        for one, optimizer in zip((dense, model), optimizers, strict=True):
            step(one, optimizer)
    torch.testing.assert_close(model(IMAGES), dense(IMAGES), rtol=1e-9, atol=1e-10)


def test_every_copy_has_the_state():
    model = vit()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    old = dict(optimizer.state[model.blocks[0].mlp.fc1.weight])
    done = surgery.upcycle(model, 3, noise=0.01)
    migrate_optimizer(optimizer, done.change, added=model.parameters())
    w1 = model.blocks[0].mlp.layer.cohorts["0"].w1
    for row in range(3):
        assert torch.equal(optimizer.state[w1]["exp_avg"][row], old["exp_avg"].t())
    assert float(optimizer.state[w1]["step"]) == 1
    assert not torch.equal(w1[0], w1[1])
    assert model.blocks[0].mlp.layer.router.columns["0"].weight not in optimizer.state


# -- back to dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["merge", "single", "distil"])
def test_equal_experts_collapse_to_the_network_that_they_were(name, how):
    model = MODELS[name]().eval()
    before = model(IMAGES)
    surgery.upcycle(model, 3)
    names = list(surgery.layers(model))
    done = surgery.collapse(model, how, run=lambda: model(IMAGES), steps=2)
    assert [(e.kind, e.layer, e.experts) for e in done.events] == [("collapsed", n, (0, 1, 2)) for n in names]
    assert not any(isinstance(m, MoELayer | Bare) for m in model.modules())
    assert sum(isinstance(m, Dense) for m in model.modules()) == len(names)
    assert (model(IMAGES) - before).abs().max() <= 1e-12
    again = surgery.upcycle(model, 2)
    assert [e.experts for e in again.events] == [(3, 4)] * len(names)  # ids are for life
    assert (model(IMAGES) - before).abs().max() <= 1e-12


def test_a_distilled_network_does_what_the_experts_did():
    torch.manual_seed(0)
    layer = MoELayer(8, 16, experts=3, router={"name": "topk", "k": 2}, shared=1, base=nn.Linear(8, 8))
    with torch.no_grad():
        layer.router.columns["0"].weight.normal_()
        for p in layer.cohorts.parameters():
            p.mul_(2)
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(2000, 8)
    layer(x)
    y = layer.eval()(x)[0].detach()
    merged = copy.deepcopy(model)
    surgery.collapse(merged, "merge")
    random = torch.get_rng_state()
    done = surgery.collapse(model, "distil", run=lambda: layer(x), steps=800, lr=3e-3)
    assert torch.equal(torch.get_rng_state(), random)
    before, after = done.errors["layer"]
    assert after < 0.4 * before
    assert not done.change.mixed  # another network by now: its state begins anew
    assert done.change.removed

    def error(one):
        return float((one["layer"](x) - y).detach().norm() / y.norm())

    assert error(model) < 0.7 * error(merged)
    assert isinstance(model["layer"], Dense)
    assert model["layer"].shared is layer.shared
    assert model["layer"].base is layer.base


def test_collapsing_picks_by_use_and_carries_the_optimizer_on():
    model = nn.ModuleDict({"layer": MoELayer(8, 12, experts=3, router="task_table").double()})
    layer = model["layer"]
    x = torch.randn(20, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for task in (1, 1, 2, 0):
        optimizer.zero_grad()
        layer(x, RouteContext(task=task))[0].square().sum().backward()
        optimizer.step()
    for options, rows in (
        ({"how": "single"}, {1: 1.0}),
        ({"how": "single", "source": 2}, {2: 1.0}),
        ({"how": "merge", "align": False}, {0: 0.25, 1: 0.5, 2: 0.25}),
        ({"how": "merge", "weights": None, "align": False}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
    ):
        one = copy.deepcopy(model)
        same = torch.optim.Adam(one.parameters(), 0.01)
        same.load_state_dict(optimizer.state_dict())
        old = one["layer"].cohorts["0"].w1
        state = dict(same.state[old])
        done = surgery.collapse(one, **options)
        migrate_optimizer(same, done.change, added=one.parameters())
        w1 = one["layer"].expert.w1
        torch.testing.assert_close(w1[0], sum(w * old[e] for e, w in rows.items()))
        mean = sum(w * state["exp_avg"][e] for e, w in rows.items())
        torch.testing.assert_close(same.state[w1]["exp_avg"][0], mean)
        assert {p for g in same.param_groups for p in g["params"]} == set(one.parameters())
    several = nn.ModuleDict({"layer": MoELayer(8, 12, experts=2, more=[{"experts": 1, "hidden": 4}])})
    with pytest.raises(ValueError, match="one kind and size"):
        surgery.collapse(several)
    several["layer"](torch.randn(30, 8))
    surgery.collapse(several, "single")
    assert isinstance(several["layer"], Dense)


# -- saving ----------------------------------------------------------------------------------------------------------------


def saved(model, fresh):
    """A newly built model with everything that was done and learned, through a file that loads without unpickling."""
    file = io.BytesIO()
    structure = {
        name: layer.structure() for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, MoELayer))
    }
    torch.save({"placed": surgery.placed(model), "layers": structure, "weights": model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    random = torch.get_rng_state()
    surgery.put(fresh, state["placed"])
    for name, own in state["layers"].items():
        fresh.get_submodule(name).restore_structure(own)
    assert torch.equal(torch.get_rng_state(), random)
    fresh.load_state_dict(state["weights"])
    return fresh


@pytest.mark.parametrize("name", MODELS)
def test_a_model_built_anew_takes_over_everything(name):
    model = MODELS[name]().eval()
    surgery.upcycle(model, 3, {"name": "topk", "k": 2}, noise=0.1)
    first = saved(model, MODELS[name]()).eval()
    assert torch.equal(first(IMAGES), model(IMAGES))
    surgery.add_experts(model, 1)
    surgery.freeze(model, [0])
    surgery.merge(model, [1, 2])
    second = saved(model, MODELS[name]()).eval()
    assert torch.equal(second(IMAGES), model(IMAGES))
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in model.parameters()]
    surgery.collapse(model)
    third = saved(model, MODELS[name]()).eval()
    assert torch.equal(third(IMAGES), model(IMAGES))
    surgery.upcycle(model, 2, split=False)
    assert torch.equal(saved(model, MODELS[name]()).eval()(IMAGES), model(IMAGES))


def test_what_cannot_be_saved_or_taken_over_is_refused():
    model = vit()
    from cmoe.moe import TopK

    surgery.upcycle(model, 2, lambda dim: TopK(dim), where="blocks.0.mlp")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: expected a router given by name"):
        surgery.placed(model)
    model = vit()
    surgery.upcycle(model, 2)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: expected a newly built model"):
        surgery.put(model, {})
    surgery.put(model, surgery.placed(model))  # what is there already stays
