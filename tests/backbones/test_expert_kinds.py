"""Backbones with experts of other kinds than feed-forward networks: attention heads, convolutions, low-rank updates."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmoe.backbones import Backbone, ConvNet, ExpertLayers, HeadLayers, ViT
from cmoe.errors import UserError
from cmoe.learners import Head, Model
from cmoe.moe import HeadLayer, RouteContext, diagnostics
from cmoe.moe.routers import TaskTable, TopK

from .helpers import DECODERS, ENCODERS, NAMES, SIZES, build, context, inputs

ROUTERS: dict[str, Any] = {"topk": lambda dim: TopK(dim, k=2), "task_table": TaskTable}
KINDS = ("moa", "moh")
ATTENDING = [name for name in NAMES if SIZES[name][0].attends]


def heads(kind: Any, router: str, **options: Any) -> HeadLayers:
    return HeadLayers(kind, 3, ROUTERS[router], shared=2 * (kind == "moh"), **options)


def attending(name: str, kind: str, router: str = "topk", seed: int = 0, **options: Any) -> Backbone:
    made, sizes, shape, vocabulary = SIZES[name]
    experts = ExpertLayers(3, ROUTERS[router], attention=heads(kind, router), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(**sizes, input_shape=shape, vocabulary=vocabulary, experts=experts)


EVERY = pytest.mark.parametrize(("name", "kind"), [(n, k) for n in ATTENDING for k in KINDS])


def test_which_backbones_attend() -> None:
    assert {SIZES[name][0].__name__ for name in ATTENDING} == {"ViT", "TextEncoder", "ByteLM"}


@EVERY
@pytest.mark.parametrize("router", ROUTERS)
def test_features_routings_and_gradients(name: str, kind: str, router: str) -> None:
    backbone = attending(name, kind, router)
    layers = backbone.moe_layers()
    features = backbone(inputs(name, 64), context(router, 64, training=True))
    assert list(features.routings) == list(layers)
    assert sum(isinstance(layer, HeadLayer) for layer in layers.values()) == 2
    assert len(layers) == (6 if "macaron" in name else 4)
    (features.x * torch.randn(features.x.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        # the same number added to all keys' scores of a query changes nothing
        assert parameter.grad.abs().sum() > 0 or key.endswith(".k.b"), key


@EVERY
def test_a_sample_does_not_depend_on_its_company(name: str, kind: str) -> None:
    backbone, x = attending(name, kind).eval(), inputs(name, 6)
    together = backbone(x, RouteContext()).x
    torch.testing.assert_close(backbone(x[1:2], RouteContext()).x, together[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_decoder_sees_no_later_byte(name: str, kind: str, cut: int) -> None:
    backbone, x = attending(name, kind).eval(), inputs(name, 3)
    changed = x.clone()
    changed[:, cut:] = inputs(name, 3, seed=9)[:, cut:]
    before, after = (backbone(v, RouteContext()).x for v in (x, changed))
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-6)
    assert (after[:, cut:] - before[:, cut:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_an_encoder_sees_no_padding(name: str, kind: str, router: str) -> None:
    backbone, x = attending(name, kind, router).eval(), inputs(name, 6)
    x[:3, 4:] = 0
    short = backbone(x[:3], context(router, 3)).x
    beside_long_ones = backbone(x, context(router, 6))
    wider = backbone(F.pad(x[:3], (0, 7)), context(router, 3)).x
    for other in (beside_long_ones.x[:3], wider):
        torch.testing.assert_close(other, short, rtol=1e-5, atol=1e-6)
    for routing in beside_long_ones.routings.values():
        assert routing.ids.shape[0] == 3 * 4 + 3 * 10  # padding is no token
    x[1] = 0
    assert backbone(x, context(router, 6)).x.isfinite().all()


@EVERY
def test_structure_and_weights_survive_a_file(name: str, kind: str) -> None:
    def model(seed: int) -> Model:
        backbone = attending(name, kind, "task_table", seed)
        return Model(backbone, Head(backbone.width, "growing"))

    lived = model(0)
    lived.head.add([0, 1])
    for layer in lived.moe_layers().values():
        layer.freeze([0])
        layer.add_experts(2, tasks=[1])
        layer.remove([1])
    file = io.BytesIO()
    torch.save({"structure": lived.structure(), "weights": lived.state_dict()}, file)
    file.seek(0)
    saved, other = torch.load(file, weights_only=True), model(7)
    other.restore_structure(saved["structure"])
    other.load_state_dict(saved["weights"])
    assert other.structure() == lived.structure()
    x, label = inputs(name, 4), RouteContext(task=1)
    assert torch.equal(lived.eval()(x, label).logits, other.eval()(x, label).logits)


def test_which_blocks_attend_with_experts() -> None:
    made, sizes, shape, vocabulary = SIZES["byte_lm"]
    for layers, places in (("all", [0, 1]), ("last", [1]), ("alternate", [1]), ([0], [0])):
        experts = ExpertLayers(2, TaskTable, layers="none", attention=heads("moa", "topk", layers=layers))
        backbone = made(**sizes, input_shape=shape, vocabulary=vocabulary, experts=experts)
        assert list(backbone.moe_layers()) == [f"blocks.{i}.attention" for i in places]
    wrong = ExpertLayers(2, TaskTable, attention=heads("moa", "topk", layers=[2]))
    with pytest.raises(UserError, match=r"model\.moe\.attention\.layers: expected indices from 0 to 1, got \[2\]"):
        made(**sizes, input_shape=shape, vocabulary=vocabulary, experts=wrong)


def test_a_trained_vits_heads_become_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal weights the network is the one that was trained; its weights are drawn here, not downloaded."""
    from cmoe.backbones import vit

    sizes = {"img_size": (8, 8), "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 4}

    def drawn(model: str, key: str, pretrained: bool, **options: Any) -> Any:
        from timm.models.vision_transformer import VisionTransformer

        assert pretrained
        torch.manual_seed(0)
        return VisionTransformer(**{**options, **sizes})

    monkeypatch.setattr(vit, "create", drawn)

    def of(attention: HeadLayers | None) -> Backbone:
        experts = None if attention is None else ExpertLayers(2, TaskTable, layers="none", attention=attention)
        return ViT(pretrained=True, input_shape=(1, 8, 8), experts=experts).eval()

    def equal(dim: int) -> TopK:
        return TopK(dim, k=3, init_std=0.0)

    x = torch.rand(3, 1, 8, 8)
    adopted = of(HeadLayers("moh", 3, equal, shared=1))
    with torch.no_grad():
        for key, parameter in adopted.named_parameters():
            if "balance" in key:
                parameter.zero_()
    torch.testing.assert_close(adopted(x, RouteContext()).x, of(None)(x, RouteContext()).x, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"model\.moe\.attention\.heads: expected 4 of size 4"):
        of(HeadLayers("moh", 2, equal))
    with pytest.raises(UserError, match=r"model\.moe\.attention\.kind: expected 'moh' with pretrained"):
        of(HeadLayers("moa", 4, equal))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expert", [{"name": "lora", "rank": 2}, {"name": "adapter", "bottleneck": 3}])
def test_low_rank_experts_on_a_frozen_network_change_nothing_at_first(name: str, expert: Any) -> None:
    made, sizes, shape, vocabulary = SIZES[name]
    experts = ExpertLayers(3, ROUTERS["topk"], expert=expert, base="frozen")
    added = made(**sizes, input_shape=shape, vocabulary=vocabulary, experts=experts).eval()
    dense = build(name, "dense").eval()
    weights, copied = dense.state_dict(), set()
    with torch.no_grad():
        for key, value in added.state_dict().items():
            plain = key.replace(".base.0.", ".").replace(".base.mlp.", ".").replace(".base.", ".")
            if plain in weights:
                value.copy_(weights[plain])
                copied.add(plain)
    assert copied == set(weights)
    x = inputs(name, 5)
    torch.testing.assert_close(added(x, RouteContext()).x, dense(x, RouteContext()).x, rtol=1e-6, atol=1e-6)
    for layer in added.moe_layers().values():
        assert layer.base is not None
        assert not any(p.requires_grad for p in layer.base.parameters())
        assert all(p.requires_grad for p in layer.cohorts.parameters())


@pytest.mark.parametrize(
    "model", ["convnext_atto", "convnext_tiny"]
)  # networks of 1x1 convolutions, and of linear maps
@pytest.mark.parametrize("base", ["none", "frozen"])
def test_convolutional_experts_route_whole_maps(model: str, base: Any) -> None:
    sizes: dict[str, Any] = {"patch": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 8]}
    expert: Any = {"name": "conv", "kernel": 3}
    experts = ExpertLayers(3, ROUTERS["topk"], expert=expert, hidden=6, base=base)
    backbone = ConvNet(model, **sizes, input_shape=(3, 8, 8), experts=experts)
    features = backbone(torch.rand(5, 3, 8, 8), RouteContext())
    assert features.x.shape == (5, 8)
    assert {routing.ids.shape for routing in features.routings.values()} == {(5, 2)}
    features.x.square().sum().backward()
    for key, layer in backbone.moe_layers().items():
        assert layer.inner == 2
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.cohorts.parameters()), key
    first = next(iter(backbone.moe_layers().values()))
    own = 0 if base == "none" else 2 * 2 * 8 * 32
    assert diagnostics.flops_per_token(first) == 2 * (2 * 2 * 9 * 8 * 6 + 3 * 8) + own
