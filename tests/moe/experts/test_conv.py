"""Convolutional experts on feature maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmoe.moe import MoELayer, RouteContext
from cmoe.moe.experts import Conv

from .kinds import DIM, spoken

HIDDEN, OUT = 6, 10
FORMS = {
    "full": {},
    "separable": {"separable": True},
    "wide": {"kernel": 5},
    "pixel": {"kernel": 1},
    "plain": {"bias": False},
}


def cohort_of(form, n=3):
    cohort = Conv(n, DIM, HIDDEN, OUT, **FORMS[form])
    cohort.reset_parameters()
    return cohort.double()


def by_hand(cohort, x, e):
    """One expert on maps (N, H, W, D), by torch's own convolutions."""

    def convolve(h, w, b, groups=1):
        return F.conv2d(h, w[e], None if b is None else b[e], padding="same", groups=groups)

    h = x.movedim(3, 1)
    if cohort.w0 is not None:
        h = convolve(h, cohort.w0, cohort.b0, groups=DIM)
    return convolve(F.gelu(convolve(h, cohort.w1, cohort.b1)), cohort.w2, cohort.b2).movedim(1, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 0, 4], [0, 0, 5], [0, 0, 0]])
@pytest.mark.parametrize("path", ["auto", "loop", "bmm"])
def test_each_expert_is_its_convolution(form, counts, path):
    cohort = cohort_of(form)
    x = torch.randn(sum(counts), 4, 7, DIM, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([by_hand(cohort, maps, e) for e, maps in enumerate(x.split(counts))])
    y = cohort(x, counts, path)
    assert y.shape == (sum(counts), 4, 7, OUT)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), [x, *cohort.parameters()])
    got = torch.autograd.grad((y * direction).sum(), [x, *cohort.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_every_expert_on_every_map(form):
    cohort = cohort_of(form)
    x = torch.randn(5, 3, 4, DIM, dtype=torch.float64)
    expected = torch.stack([by_hand(cohort, x, e) for e in range(3)])
    torch.testing.assert_close(cohort.every(x), expected, rtol=1e-10, atol=1e-10)
    own = torch.randn(3, 5, 3, 4, DIM, dtype=torch.float64)
    expected = torch.stack([by_hand(cohort, own[e], e) for e in range(3)])
    torch.testing.assert_close(cohort.blocks(own), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cohort.blocks(own[[2, 0]], [2, 0]), expected[[2, 0]], rtol=1e-10, atol=1e-10)


def test_balanced_maps_are_one_grouped_convolution(monkeypatch):
    cohort, calls, real = cohort_of("full"), [], F.conv2d

    def counted(*args, **options):
        calls.append(options.get("groups"))
        return real(*args, **options)

    monkeypatch.setattr(F, "conv2d", counted)
    cohort(torch.randn(6, 4, 4, DIM, dtype=torch.float64), [2, 2, 2], "auto")
    assert calls == [3, 3]
    calls.clear()
    cohort(torch.randn(6, 4, 4, DIM, dtype=torch.float64), [3, 1, 2], "auto")
    assert calls == [1] * 6


def test_the_router_chooses_for_a_map_by_its_mean():
    layer = spoken(MoELayer(DIM, HIDDEN, experts=4, expert="conv", router={"name": "topk", "k": 2}))
    tokens = MoELayer(DIM, HIDDEN, experts=4, router={"name": "topk", "k": 2})
    tokens.router.load_state_dict(layer.router.state_dict())
    x = torch.randn(2, 5, 3, 4, DIM)
    y, routing = layer(x)
    _, expected = tokens(x.mean((2, 3)))
    assert y.shape == x.shape
    assert routing.ids.shape == (10, 2)
    assert torch.equal(routing.ids, expected.ids)
    torch.testing.assert_close(routing.weights, expected.weights)
    one_a_map, _ = layer(x, RouteContext(task=torch.arange(10), valid=torch.arange(10) < 9))
    assert one_a_map.flatten(0, 1)[9].abs().sum() == 0
    torch.testing.assert_close(one_a_map.flatten(0, 1)[:9], y.flatten(0, 1)[:9])


def test_a_uniform_input_shows_what_the_border_does():
    """With a kernel of three pixels the border sees zeros, the middle does not; a kernel of one sees no border."""
    x = torch.ones(1, 5, 5, DIM)
    for kernel, border in ((3, True), (1, False)):
        layer = MoELayer(DIM, HIDDEN, experts=1, expert={"name": "conv", "kernel": kernel}, router="task_table")
        y, _ = layer(x, RouteContext(task=0))
        assert torch.allclose(y[0, 2, 2], y[0, 0, 0], atol=1e-6) != border


def test_tokens_experts_in_a_layer_of_maps_work_on_each_pixel():
    layer = spoken(
        MoELayer(DIM, HIDDEN, experts=2, expert="conv", router="task_table", more=[{"experts": 1, "expert": "ffn"}])
    )
    layer.assign([2], 0)
    x = torch.randn(3, 4, 5, DIM)
    alone = MoELayer(DIM, HIDDEN, experts=1, router="task_table")
    alone.cohorts["0"].load_state_dict(layer.cohorts["1"].state_dict())
    torch.testing.assert_close(layer(x, RouteContext(task=0))[0], alone(x, RouteContext(task=0))[0])
