"""What holds for every backbone, dense and with experts."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmoe.backbones import Backbone, ExpertLayers
from cmoe.learners import Head, Model
from cmoe.moe import MoELayer, RouteContext
from cmoe.moe.experts import FFN, Linear
from cmoe.moe.routers import TaskTable

from .helpers import DECODERS, ENCODERS, KINDS, NAMES, SIZES, build, context, inputs

EVERY = pytest.mark.parametrize(("name", "kind"), [(n, k) for n in NAMES for k in KINDS])


@EVERY
def test_features_have_the_declared_shape_and_experts_answer(name: str, kind: str) -> None:
    backbone, x = build(name, kind).eval(), inputs(name, 5)
    features = backbone(x, context(kind, 5))
    lead = (5, 12) if name in DECODERS else (5,)
    assert features.x.shape == (*lead, backbone.width)
    assert features.x.isfinite().all()
    assert list(features.routings) == list(backbone.moe_layers())
    assert bool(features.routings) == (kind != "dense")
    for routing in features.routings.values():
        assert set(routing.ids.unique().tolist()) <= {0, 1, 2}


@EVERY
def test_gradients_reach_every_parameter_and_every_busy_expert(name: str, kind: str) -> None:
    backbone = build(name, kind)
    features = backbone(inputs(name, 64), context(kind, 64, training=True))
    target = torch.randn(features.x.shape, generator=torch.Generator().manual_seed(2))
    loss = (features.x * target).sum()
    for routing in features.routings.values():
        loss = loss + sum(routing.aux.values())
    loss.backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    for place, layer in backbone.moe_layers().items():
        busy = sorted(set(features.routings[place].ids.flatten().tolist()) - {-1})
        assert len(busy) >= 2
        for parameter in layer.cohorts["0"].parameters():
            assert parameter.grad is not None
            learns = parameter.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
            # of a ViT's last block only the class token counts
            assert learns == busy if name != "vit" else set(learns) <= set(busy)


@EVERY
def test_same_seed_same_weights(name: str, kind: str) -> None:
    first, again, other = (build(name, kind, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert any(not torch.equal(other[key], value) for key, value in first.items())


@EVERY
def test_a_sample_does_not_depend_on_its_company(name: str, kind: str) -> None:
    backbone, x = build(name, kind).eval(), inputs(name, 6)
    together = backbone(x, context(kind, 6)).x
    task = 1 if kind == "task_table" else None
    alone = backbone(x[1:2], RouteContext(task=task)).x
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@EVERY
def test_one_label_for_all_is_that_label_for_each(name: str, kind: str) -> None:
    backbone, x = build(name, kind).eval(), inputs(name, 4)
    one, each = (backbone(x, RouteContext(task=task)).x for task in (2, torch.full((4,), 2)))
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)
    if kind == "task_table":
        assert not torch.allclose(one, backbone(x, RouteContext(task=0)).x)


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_with_the_dense_weights_is_the_dense_network(name: str) -> None:
    dense, sparse = build(name, "dense").eval(), build(name, "task_table", seed=3, experts=1).eval()
    modules, weights = dict(dense.named_modules()), dense.state_dict()
    with torch.no_grad():
        for key, value in sparse.state_dict().items():
            if key in weights:
                value.copy_(weights[key])
        for place, layer in sparse.moe_layers().items():
            copy_dense(modules[place], layer)
    x = inputs(name, 5)
    torch.testing.assert_close(sparse(x, RouteContext(task=0)).x, dense(x, RouteContext()).x, rtol=1e-4, atol=1e-5)


def copy_dense(module: nn.Module, layer: MoELayer) -> None:
    cohort = layer.cohorts["0"]
    if isinstance(cohort, Linear):
        assert isinstance(module, nn.Linear)
        assert cohort.b is not None
        cohort.w[0].copy_(module.weight.T)
        cohort.b[0].copy_(module.bias)
        return
    assert isinstance(cohort, FFN)
    maps = [(cohort.w1, cohort.b1, module.get_submodule("fc1")), (cohort.w2, cohort.b2, module.get_submodule("fc2"))]
    for w, b, linear in maps:
        values = dict(linear.named_parameters())
        assert b is not None
        w[0].copy_(values["weight"].flatten(1).T)  # timm's ConvNeXt has convolutions of 1x1
        b[0].copy_(values["bias"])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_decoder_sees_no_later_byte(name: str, kind: str, cut: int) -> None:
    backbone, x = build(name, kind).eval(), inputs(name, 3)
    changed = x.clone()
    changed[:, cut:] = inputs(name, 3, seed=9)[:, cut:]
    before, after = (backbone(v, context(kind, 3)).x for v in (x, changed))
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-6)
    assert (after[:, cut:] - before[:, cut:]).abs().max() > 1e-3
    assert type(backbone).causal


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_sees_both_sides_and_no_padding(name: str, kind: str) -> None:
    backbone = build(name, kind).eval()
    x = inputs(name, 6)
    x[:3, 4:] = 0
    short = backbone(x[:3], context(kind, 3)).x
    beside_long_ones = backbone(x, context(kind, 6))
    cut = backbone(x[:3, :4], context(kind, 3)).x
    wider = backbone(F.pad(x[:3], (0, 7)), context(kind, 3)).x
    for other in (beside_long_ones.x[:3], cut, wider):
        torch.testing.assert_close(other, short, rtol=1e-5, atol=1e-6)
    for routing in beside_long_ones.routings.values():
        assert routing.ids.shape[0] == 3 * 4 + 3 * 10  # padding is no token
        assert (routing.ids >= 0).all()
    last = x.clone()
    last[:3, 3] = x[:3, 3] % 49 + 1
    assert (backbone(last[:3], context(kind, 3)).x - short).abs().max() > 1e-4


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_has_finite_features(name: str, kind: str) -> None:
    backbone = build(name, kind).eval()
    x = inputs(name, 3)
    x[1] = 0
    beside = backbone(x, context(kind, 3)).x
    alone = backbone(x[1:2], RouteContext(task=1 if kind == "task_table" else None)).x
    assert beside.isfinite().all()
    torch.testing.assert_close(alone, beside[1:2], rtol=1e-5, atol=1e-6)


def grown(name: str, kind: str, seed: int) -> Model:
    """A model that has lived: experts added and frozen, tasks assigned, outputs grown."""
    torch.manual_seed(seed)
    model = Model(build(name, kind, seed), Head(SIZES[name][1].get("dim", 10), "growing"))
    model.head.width = model.backbone.width
    model.head.add([4, 1])
    for layer in model.moe_layers().values():
        layer.freeze([0, 2])
        layer.add_experts(2, tasks=[1])
        layer.assign([0, 1], 0)
        layer.remove([2])
    model.head.add([0, 3, 2])
    model.head.blocks[0].requires_grad_(False)
    next(model.backbone.parameters()).requires_grad_(False)
    return model.eval()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structure_and_weights_survive_a_file(name: str, kind: str, dtype: torch.dtype) -> None:
    model = grown(name, kind, 0).to(dtype)
    file = io.BytesIO()
    torch.save({"structure": model.structure(), "weights": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    other = Model(build(name, kind, 7), Head(model.backbone.width, "growing")).to(dtype).eval()
    before = torch.get_rng_state()
    other.restore_structure(saved["structure"])
    assert torch.equal(torch.get_rng_state(), before), "restoring draws no random numbers"
    other.load_state_dict(saved["weights"])
    assert other.structure() == model.structure()
    for (key, p), (other_key, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (key, p.requires_grad, p.dtype) == (other_key, q.requires_grad, q.dtype)
        assert torch.equal(p, q)
    x = inputs(name, 4)
    x = x.to(dtype) if x.is_floating_point() else x
    label = RouteContext(task=1)
    assert torch.equal(model(x, label).logits, other(x, label).logits)
    assert not torch.equal(model(x, label).logits, grown(name, kind, 1).to(dtype)(x, label).logits)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("convnet", "mlp")])
def test_dropout_acts_in_training_only(name: str) -> None:
    backbone, x = build(name, "dense", dropout=0.5), inputs(name, 4)
    assert not torch.equal(backbone(x, RouteContext()).x, backbone(x, RouteContext()).x)
    backbone.eval()
    assert torch.equal(backbone(x, RouteContext()).x, backbone(x, RouteContext()).x)


@pytest.mark.parametrize(
    ("layers", "places"), [("all", [0, 1]), ("last", [1]), ("alternate", [1]), ([0], [0]), ([-1], [1])]
)
def test_layers_picks_where_experts_go(layers: str | list[int], places: list[int]) -> None:
    made, sizes, shape, _ = SIZES["mlp"]
    backbone: Backbone = made(
        **sizes, input_shape=shape, vocabulary=None, experts=ExpertLayers(2, TaskTable, layers=layers)
    )
    assert list(backbone.moe_layers()) == [f"layers.{i}" for i in places]
