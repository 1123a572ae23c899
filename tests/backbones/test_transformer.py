"""Blocks of the text backbones, with a feed-forward network before attention and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cmoe.backbones import Backbone, ByteLM, ExpertLayers, TextEncoder
from cmoe.backbones.transformer import Block, Blocks, FeedForward, SelfAttention
from cmoe.moe import RouteContext
from cmoe.moe.routers import TaskTable

from .helpers import ENCODERS, build, inputs

TEXTS = pytest.mark.parametrize("made", [TextEncoder, ByteLM])
LAST = "blocks.1.mlp"
PLACES = ["blocks.0.mlp0", "blocks.0.mlp", "blocks.1.mlp0", LAST]


def backbone(made: type[Backbone], experts: ExpertLayers | None = None, **options: object) -> Backbone:
    torch.manual_seed(0)
    return made(depth=2, dim=16, heads=2, hidden=24, **options, input_shape=(10,), vocabulary=258, experts=experts)


def reference(block: Block, x: Tensor, causal: bool) -> Tensor:
    """A block as formula (10) of the paper has it, with torch's own attention, token by token."""
    size = x.shape[-1]
    attention = nn.MultiheadAttention(size, block.attention.heads, batch_first=True).eval()
    with torch.no_grad():
        assert attention.in_proj_weight is not None
        attention.in_proj_weight.copy_(block.attention.qkv.weight)
        attention.in_proj_bias.copy_(block.attention.qkv.bias)
        attention.out_proj.weight.copy_(block.attention.out.weight)
        attention.out_proj.bias.copy_(block.attention.out.bias)
    step = 1.0
    if block.macaron:
        step = 0.5
        x = x + step * block.mlp0(block.norm0(x))
    h = block.norm1(x)
    mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if causal else None
    x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
    return x + step * block.mlp(block.norm2(x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("macaron", [True, False])
def test_a_block_is_its_formula(macaron: bool, causal: bool) -> None:
    torch.manual_seed(1)
    before = FeedForward(16, 24) if macaron else None
    block = Block(16, SelfAttention(16, 2, 0.0), FeedForward(16, 24), 0.0, before).eval()
    x = torch.randn(3, 7, 16)
    y, decided = block(x, causal, RouteContext())
    torch.testing.assert_close(y, reference(block, x, causal), rtol=1e-5, atol=1e-6)
    assert not decided


@TEXTS
@pytest.mark.parametrize(
    ("layers", "places"),
    [
        ("all", PLACES),
        ("last", [LAST]),
        ("alternate", ["blocks.0.mlp", LAST]),
        ([0, 2], ["blocks.0.mlp0", "blocks.1.mlp0"]),
        ([-1, 0], ["blocks.0.mlp0", LAST]),
    ],
)
def test_layers_counts_all_feed_forward_networks_in_depth(
    made: type[Backbone], layers: str | list[int], places: list[str]
) -> None:
    experts = ExpertLayers(2, TaskTable, layers=layers)
    model = backbone(made, experts, macaron=True)
    assert list(model.moe_layers()) == places
    assert list(model(torch.randint(1, 250, (3, 10)), RouteContext(task=0)).routings) == places


@TEXTS
def test_without_the_option_nothing_is_before_attention(made: type[Backbone]) -> None:
    with_it, without = (set(backbone(made, macaron=on).state_dict()) for on in (True, False))
    assert without < with_it
    assert {key.split(".")[2] for key in with_it - without} == {"norm0", "mlp0"}


@TEXTS
def test_what_a_router_remembers_goes_through_all_layers_in_depth(made: type[Backbone]) -> None:
    seen: list[tuple[str, float]] = []

    class Counting(TaskTable):
        """Hands on how many layers there were before."""

        def forward(self, x: Tensor, context: RouteContext, view: object) -> object:
            routing = super().forward(x, context, view)
            before = 0.0 if context.state is None else float(context.state)
            seen.append((places[id(self)], before))
            routing.state = torch.tensor(before + 1)
            return routing

    model = backbone(made, ExpertLayers(2, Counting), macaron=True)
    places = {id(layer.router): name for name, layer in model.moe_layers().items()}
    model(torch.randint(1, 250, (3, 10)), RouteContext(task=0))
    assert seen == [(name, float(i)) for i, name in enumerate(PLACES)]


@pytest.mark.parametrize("name", ENCODERS)
def test_only_a_macaron_expert_changes_what_attention_sees(name: str) -> None:
    model, x, seen = build(name, "task_table").eval(), inputs(name, 3), []
    block = model.get_submodule("blocks.0")
    block.get_submodule("attention").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for task in (0, 1):
        model(x, RouteContext(task=task))
    assert torch.equal(*seen) == (not name.endswith("macaron"))


def test_blocks_take_their_dense_width_from_hidden() -> None:
    layers = Blocks(2, 16, 2, 24, 0.0, None, macaron=True)
    widths = {name: part.fc1.out_features for name, part in layers.named_modules() if isinstance(part, FeedForward)}
    assert widths == {"0.mlp0": 24, "0.mlp": 24, "1.mlp0": 24, "1.mlp": 24}
