"""The layer beside other libraries' blocks: the same weights and inputs give the same outputs and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from soft_moe_pytorch import SoftMoE
from st_moe_pytorch import MoE as STMoE
from torch import Tensor, nn
from transformers import (
    DbrxConfig,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    NllbMoeConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.mixtral import modeling_mixtral
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.switch_transformers import modeling_switch_transformers as modeling_switch

from cmoe.moe import MoELayer, RouteContext, losses
from cmoe.moe.routing import Router, SoftRouting

BATCH, LENGTH, DIM, HIDDEN, EXPERTS = 2, 15, 8, 12, 6
SWIGLU = {"name": "ffn", "activation": "swiglu", "bias": False}
EXACT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}

Read = Callable[[nn.Parameter], Tensor]  # of a library's parameter its value or its gradient
Layout = Callable[[Read], Tensor]  # a library's parameters as one stacked tensor in our layout


@dataclass
class Pair:
    """A library's block and the layer that should be the same.

    Attributes:
        block: the library's.
        call: input (B, L, D) to output.
        layer: ours.
        layouts: our parameter's name -> the library's in our layout.
        quiet: parameters of the block that have no counterpart; 0, so that they change nothing.
        norms: scales of the block's norms; 1.
        before: what the block does to its input first.
    """

    block: nn.Module
    call: Callable[[Tensor], Tensor]
    layer: MoELayer
    layouts: dict[str, Layout]
    quiet: tuple[nn.Parameter, ...] = ()
    norms: tuple[nn.Parameter, ...] = ()
    before: Callable[[Tensor], Tensor] = lambda x: x

    def draw(self, dtype: torch.dtype) -> Pair:
        """Random weights, the same on both sides, large enough that every path counts."""
        self.block.to(dtype)
        self.layer.to(dtype)
        with torch.no_grad():
            for p in self.block.parameters():
                p.normal_(0.0, 0.5)
            for p in self.quiet:
                p.zero_()
            for p in self.norms:
                p.fill_(1.0)
            for name, layout in self.layouts.items():
                self.layer.get_parameter(name).copy_(layout(lambda p: p.data))
        assert set(self.layouts) == {name for name, _ in self.layer.named_parameters()}
        return self


def ours(router: str, expert: dict, **options) -> MoELayer:
    """Our layer without auxiliary losses: those blocks have none."""
    spec = {"name": router, "switch": 0.0, **options}
    return MoELayer(DIM, HIDDEN, experts=EXPERTS, expert=expert, router=spec)


def stacked(gate: nn.Module, experts: nn.Module) -> dict[str, Layout]:
    """How most of transformers' blocks lay out their experts: (E, 2H, D) with the gate first, and (E, D, H)."""
    return {
        "router.columns.0.weight": lambda read: read(gate.weight),
        "cohorts.0.w1": lambda read: read(experts.gate_up_proj).mT,
        "cohorts.0.w2": lambda read: read(experts.down_proj).mT,
    }


def mixtral(implementation: str) -> Pair:
    """Top-2 before the softmax: transformers computes softmax over all, renormalised over the chosen, the same number."""
    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    config._experts_implementation = implementation
    block = modeling_mixtral.MixtralSparseMoeBlock(config)
    return Pair(block, block, ours("topk", SWIGLU, k=2), stacked(block.gate, block.experts))


def granite() -> Pair:
    """Top-k of the scores, then their softmax."""
    config = GraniteMoeConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    block = GraniteMoeMoE(config)
    return Pair(block, block, ours("topk", SWIGLU, k=3), stacked(block.router, block.experts))


def olmoe() -> Pair:
    """Softmax over all, top-k, not renormalised."""
    config = OlmoeConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=False
    )
    config._experts_implementation = "eager"
    block = OlmoeSparseMoeBlock(config)
    return Pair(block, block, ours("topk", SWIGLU, k=3, order="after"), stacked(block.gate, block.experts))


def qwen2() -> Pair:
    """As OLMoE; its shared expert is given an output of 0."""
    config = Qwen2MoeConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config)
    layer = ours("topk", SWIGLU, k=2, order="after")
    return Pair(block, block, layer, stacked(block.gate, block.experts), (block.shared_expert.down_proj.weight,))


def deepseek(shared: int) -> Pair:
    """Sigmoid scores, chosen with the load bias and weighted without it, beside shared experts.

    transformers always has a shared one; without any of ours it is given an output of 0.
    """
    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_shared_experts=max(shared, 1),
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    config._experts_implementation = "eager"
    block = DeepseekV3MoE(config)
    router = {"name": "sigmoid_bias", "k": 3, "rate": 0.0}
    layer = MoELayer(DIM, HIDDEN, experts=EXPERTS, expert=SWIGLU, router=router, shared=shared)
    bias = torch.tensor([0.4, 0.0, -0.4, 0.1, 0.0, -0.1])
    block.gate.e_score_correction_bias.copy_(bias)
    layer.router.columns["0"].get_buffer("bias").copy_(bias)
    layouts = stacked(block.gate, block.experts)
    always = block.shared_experts
    if not shared:
        return Pair(block, block, layer, layouts, (always.down_proj.weight,))
    layouts["shared.w1"] = lambda read: torch.cat([read(always.gate_proj.weight), read(always.up_proj.weight)]).mT[None]
    layouts["shared.w2"] = lambda read: read(always.down_proj.weight).mT[None]
    return Pair(block, block, layer, layouts)


def dbrx(normed: bool) -> Pair:
    """Softmax over all, top-k, divided by the sum of the chosen (the same as the softmax over them) or not."""
    config = DbrxConfig(
        d_model=DIM,
        ffn_config={
            "hidden_size": DIM,
            "ffn_hidden_size": HIDDEN,
            "moe_num_experts": EXPERTS,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": 1.0 if normed else None,
            "ffn_act_fn": {"name": "silu"},
        },
    )
    block = DbrxFFN(config)
    mlp = block.experts.mlp

    def rows(read: Read, p: nn.Parameter) -> Tensor:
        return read(p).view(EXPERTS, HIDDEN, DIM)

    layouts: dict[str, Layout] = {
        "router.columns.0.weight": lambda read: read(block.router.layer.weight),
        "cohorts.0.w1": lambda read: torch.cat([rows(read, mlp.w1), rows(read, mlp.v1)], 1).mT,
        "cohorts.0.w2": lambda read: rows(read, mlp.w2),
    }
    return Pair(block, block, ours("topk", SWIGLU, k=2, order="before" if normed else "after"), layouts)


def switch(places: int | None, dtype: torch.dtype) -> Pair:
    """One expert per token, weighted by its probability; with places, each expert takes that many of a sequence.

    transformers counts places per sequence and we do per batch, so that one sequence is compared.
    """
    config = SwitchTransformersConfig(
        d_model=DIM,
        d_ff=HIDDEN,
        num_experts=EXPERTS,
        expert_capacity=places or BATCH * LENGTH,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn="relu",
    )
    block = modeling_switch.SwitchTransformersSparseMLP(config)
    block.router.dtype = dtype  # its configuration refuses float64
    experts = list(block.experts.values())
    layouts: dict[str, Layout] = {
        "router.columns.0.weight": lambda read: read(block.router.classifier.weight),
        "cohorts.0.w1": lambda read: torch.stack([read(e.wi.weight).mT for e in experts]),
        "cohorts.0.w2": lambda read: torch.stack([read(e.wo.weight).mT for e in experts]),
    }
    factor = places * EXPERTS / (BATCH * LENGTH) if places else 0.0
    layer = ours("switch", {"name": "ffn", "activation": "relu", "bias": False}, noise="none", capacity=factor)
    return Pair(block, lambda x: block(x.reshape(1, -1, DIM)).view_as(x), layer, layouts)


def st_moe() -> Pair:
    """Top-2, renormalised; places for all, the second expert always used, no straight-through gradient."""
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)) for _ in range(EXPERTS)
    )
    block = STMoE(
        DIM,
        EXPERTS,
        gating_top_n=2,
        capacity_factor_train=2.0 * EXPERTS,
        threshold_train=0.0,
        straight_through_dispatch_tensor=False,
        experts=experts,
    )
    layouts: dict[str, Layout] = {
        "router.columns.0.weight": lambda read: read(block.gate.to_gates.weight),
        "cohorts.0.w1": lambda read: torch.stack([read(e[0].weight).mT for e in experts]),
        "cohorts.0.b1": lambda read: torch.stack([read(e[0].bias) for e in experts]),
        "cohorts.0.w2": lambda read: torch.stack([read(e[2].weight).mT for e in experts]),
        "cohorts.0.b2": lambda read: torch.stack([read(e[2].bias) for e in experts]),
    }
    return Pair(block, lambda x: block(x).outputs, ours("topk", {"name": "ffn"}, k=2), layouts)


class Slots(Router):
    """Soft MoE's weights from slot vectors: over a sequence's tokens for the slots, over all slots for the tokens."""

    def __init__(self, dim: int, slots: int) -> None:
        super().__init__(dim)
        self.slots = slots
        self.vectors = nn.Parameter(torch.zeros(EXPERTS, slots, dim))

    def forward(self, x_TD, context, experts):
        unit_ESD = self.vectors / self.vectors.norm(dim=-1, keepdim=True) * self.dim**0.5
        scores_GLS = x_TD.view(BATCH, LENGTH, -1) @ unit_ESD.view(-1, self.dim).mT
        return SoftRouting(scores_GLS.softmax(1), scores_GLS.softmax(2), self.slots, experts.ids)

    def experts_per_token(self, experts):
        return len(experts)


def soft_moe() -> Pair:
    """Slots that mix tokens; the library norms its input first, so that our layer gets it normed."""
    block = SoftMoE(DIM, num_experts=EXPERTS, num_slots=2, expert_mult=2)
    experts = block.experts.experts
    layer = MoELayer(DIM, 2 * DIM, experts=EXPERTS, router=lambda dim: Slots(dim, 2))
    layouts: dict[str, Layout] = {
        "router.vectors": lambda read: read(block.slot_embeds),
        "cohorts.0.w1": lambda read: torch.stack([read(e[0].weight).mT for e in experts]),
        "cohorts.0.b1": lambda read: torch.stack([read(e[0].bias) for e in experts]),
        "cohorts.0.w2": lambda read: torch.stack([read(e[3].weight).mT for e in experts]),
        "cohorts.0.b2": lambda read: torch.stack([read(e[3].bias) for e in experts]),
    }
    norms = (block.norm.gamma, block.slot_norm.gamma)
    return Pair(block, block, layer, layouts, norms=norms, before=block.norm)


F32, F64 = torch.float32, torch.float64
BLOCKS: dict[str, tuple[Callable[[], Pair], torch.dtype]] = {
    "Mixtral, eager": (lambda: mixtral("eager"), F32),
    "Mixtral, batched_mm": (lambda: mixtral("batched_mm"), F32),
    "Mixtral, grouped_mm": (lambda: mixtral("grouped_mm"), F32),
    "GraniteMoE": (granite, F32),
    "OLMoE": (olmoe, F32),
    "Qwen2-MoE": (qwen2, F32),
    "DeepSeek-V3": (lambda: deepseek(0), F32),
    "DeepSeek-V3, 2 shared": (lambda: deepseek(2), F32),
    "DBRX": (lambda: dbrx(True), F64),
    "DBRX, not normed": (lambda: dbrx(False), F64),
    "Switch": (lambda: switch(None, F64), F64),
    "Switch, 4 places": (lambda: switch(4, F64), F64),
    "Switch, float32": (lambda: switch(4, F32), F32),
    "st-moe-pytorch": (st_moe, F64),
    "st-moe-pytorch, float32": (st_moe, F32),
    "soft-moe-pytorch": (soft_moe, F64),
    "soft-moe-pytorch, float32": (soft_moe, F32),
}


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and the gradient of an output."""
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), g.to(dtype)


def gradient(p: nn.Parameter) -> Tensor:
    """A library that skips idle experts leaves them without a gradient."""
    return torch.zeros_like(p) if p.grad is None else p.grad


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_and_gradients_are_the_librarys(name):
    build, dtype = BLOCKS[name]
    torch.manual_seed(0)
    pair = build().draw(dtype)
    pair.block.train()
    pair.layer.train()
    x, g = data(dtype)
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = pair.call(theirs_x)
    y, routing = pair.layer(pair.before(ours_x))
    assert not routing.aux
    assert expected.abs().mean() > 0.1
    if routing.kind == "sparse":
        assert routing.ids.unique().numel() >= EXPERTS - 1
    torch.testing.assert_close(y, expected, **EXACT[dtype])
    expected.backward(g)
    y.backward(g)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, **EXACT[dtype])
    for parameter, layout in pair.layouts.items():
        got = pair.layer.get_parameter(parameter).grad
        assert got is not None
        assert got.abs().max() > 0.01
        torch.testing.assert_close(got, layout(gradient), **EXACT[dtype], msg=lambda m, p=parameter: f"{p}: {m}")


def test_the_places_of_switch_are_scarce():
    """What is compared above leaves tokens out."""
    pair = switch(4, F64)
    torch.manual_seed(0)
    _, routing = pair.draw(F64).layer(data(F64)[0])
    assert (routing.ids < 0).sum() >= 3


@pytest.fixture
def scores() -> Tensor:
    return 2 * torch.randn(BATCH * LENGTH, EXPERTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_the_load_balance_loss_is_mixtrals_over_k(scores, k, padded):
    """transformers' shares of assignments sum to K, ours to 1: a balanced batch gives them K, us 1."""
    scores = scores.requires_grad_()
    valid = torch.arange(BATCH * LENGTH) % 4 != 1 if padded else None
    theirs = modeling_mixtral.load_balancing_loss_func((scores,), EXPERTS, k, valid)
    assert isinstance(theirs, Tensor)
    (expected,) = torch.autograd.grad(theirs / k, scores)
    own = losses.switch_loss(scores.softmax(-1), scores.topk(k).indices, valid)
    (got,) = torch.autograd.grad(own, scores)
    torch.testing.assert_close(own, (theirs / k).double(), rtol=1e-5, atol=0.0)  # theirs is summed in float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_the_load_balance_loss_of_switch_is_averaged_over_sequences(scores):
    """transformers' Switch takes each sequence for a group; of one sequence it is ours."""
    probs = scores.softmax(-1).view(BATCH, LENGTH, EXPERTS)
    chosen = probs.argmax(-1)
    groups = [losses.switch_loss(p, c.unsqueeze(1)) for p, c in zip(probs, chosen, strict=True)]
    theirs = modeling_switch.load_balancing_loss_func(probs, chosen)
    torch.testing.assert_close(torch.stack(groups).mean(), theirs, rtol=1e-6, atol=0.0)
    assert groups[0] != groups[1]


def test_the_z_loss_is_that_of_switch_and_st_moe(scores):
    theirs = modeling_switch.router_z_loss_func(scores.view(BATCH, LENGTH, EXPERTS))
    torch.testing.assert_close(losses.z_loss(scores), torch.as_tensor(theirs))
    block = STMoE(EXPERTS, EXPERTS).double().train()
    with torch.no_grad():
        block.gate.to_gates.weight.copy_(torch.eye(EXPERTS))
    torch.testing.assert_close(losses.z_loss(scores), block.gate(scores.unsqueeze(0))[3])


def test_the_balance_loss_of_st_moe_counts_first_choices_only(scores):
    """E² times the mean of f·P over the experts is E·Σ f·P; f is of first choices (that found a place), where ours is of
    all assignments."""
    block = STMoE(EXPERTS, EXPERTS, gating_top_n=2, capacity_factor_train=float(EXPERTS)).double().train()
    with torch.no_grad():
        block.gate.to_gates.weight.copy_(torch.eye(EXPERTS))
    balance = block.gate(scores.unsqueeze(0))[2]
    columns = scores.topk(2).indices
    torch.testing.assert_close(losses.switch_loss(scores.softmax(-1), columns[:, :1]), balance)
    assert abs(losses.switch_loss(scores.softmax(-1), columns) - balance) > 1e-3


def top_2(policy: str) -> tuple[NllbMoeTop2Router, MoELayer]:
    """The GShard router of NLLB with room for everyone, and ours with its weights."""
    config = NllbMoeConfig(
        d_model=DIM,
        num_experts=EXPERTS,
        expert_capacity=BATCH * LENGTH,
        second_expert_policy=policy,
        normalize_router_prob_before_dropping=True,
        router_dtype="float32",
    )
    theirs = NllbMoeTop2Router(config).train()
    layer = MoELayer(DIM, HIDDEN, experts=EXPERTS, router={"name": "gshard", "capacity": 0.0}).train()
    with torch.no_grad():
        theirs.classifier.weight.normal_()
        layer.router.columns["0"].get_parameter("weight").copy_(theirs.classifier.weight)
    return theirs, layer


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """(T, K) as (T, E), 0 where nobody is."""
    out = weights.new_zeros(len(ids), EXPERTS)
    return out.scatter_add(1, ids.clamp(min=0), weights.masked_fill(ids < 0, 0.0))


def test_the_weights_of_gshard_are_those_of_nllb():
    theirs, layer = top_2("all")
    x = data(F32)[0].view(-1, DIM)
    routing = layer.router.eval()(x, RouteContext(), layer.view)
    torch.testing.assert_close(dense(routing.ids, routing.weights), theirs(x)[1], **EXACT[F32])


def test_the_second_expert_of_gshard_is_drawn_by_its_normed_gate():
    """With probability 2·g₂ where g₁ + g₂ = 1 (Algorithm 1 of the paper); the same random numbers give the same choices."""
    theirs, layer = top_2("all")
    x = data(F32)[0].view(-1, DIM)
    gates = theirs(x)[1]  # of both experts, normed
    torch.manual_seed(7)
    expected = torch.where(gates < gates.amax(1, keepdim=True), 2 * gates > torch.rand(len(x))[:, None], gates > 0)
    torch.manual_seed(7)
    routing = layer.router(x, RouteContext(), layer.view)
    got = dense(routing.ids, routing.weights) > 0
    assert torch.equal(got, expected)
    assert 0 < (routing.ids < 0).sum() < len(x)


def test_sparsemixer_is_phi_moes() -> None:
    """The first of the two experts that Phi-3.5-MoE draws: choice and weight outside training, gradient always."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    layer = MoELayer(6, 4, experts=6, router={"name": "sparsemixer", "jitter": 0.2, "switch": 0.0}).double().eval()
    with torch.no_grad():
        layer.router.columns["0"].weight.copy_(torch.eye(6))
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    weights, experts = sparsemixer(theirs, jitter_eps=0.2, training=False, top_k=2)
    routing = layer.router(x, RouteContext(), layer.view)
    assert torch.equal(routing.ids[:, 0], experts[:, 0])
    torch.testing.assert_close(routing.weights[:, 0], weights[:, 0])
    direction = torch.randn(50, dtype=torch.float64)
    (routing.weights[:, 0] * direction).sum().backward()
    (weights[:, 0] * direction).sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad)
