"""Streaming linear discriminant analysis against its formula and against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from cmoe.errors import UserError
from cmoe.strategies import NCM, SLDA

from .helpers import opened, run
from .stepping import EXACT, HEADS, the
from .test_ncm import THREE, learned


def filled(root: Path, shrinkage: float, x: Tensor, units: Tensor, batches: int) -> SLDA:
    """The statistics of some features, taken in batch by batch."""
    of = opened(root, EXACT, {"strategy": {"name": "slda", "shrinkage": shrinkage}})
    slda = the(of, SLDA)
    for part, where in zip(x.chunk(batches), units.chunk(batches), strict=True):
        slda.add(part, where)
    return slda


def samples(each: int) -> tuple[Tensor, Tensor]:
    """As many samples of each of ten outputs, in random order, with correlated features; one feature is constant."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    centres = 2 * torch.randn(10, 16, generator=generator, dtype=torch.float64)
    units = torch.arange(10).repeat(each)[torch.randperm(10 * each, generator=generator)]
    x = centres[units] + torch.randn(10 * each, 16, generator=generator, dtype=torch.float64) @ mix
    return x.index_fill(1, torch.tensor([3]), 5.0), units


@pytest.mark.parametrize("shrinkage", [1e-4, 0.1, 0.7])
@pytest.mark.parametrize("batches", [1, 7])
def test_it_is_linear_discriminant_analysis(tmp_path: Path, shrinkage: float, batches: int) -> None:
    """With as many samples of each class scikit-learn's priors are equal. It shrinks towards the mean variance times I
    instead of I, so that an equivalent share gives the same discriminants but for one factor."""
    x, units = samples(12)
    slda = filled(tmp_path, shrinkage, x, units, batches)
    weight, bias = slda.outputs()
    within = sum(np.cov(x[units == u].numpy().T, bias=True) for u in range(10)) / 10
    np.testing.assert_allclose((slda.scatter / slda.count.sum()).numpy(), within, rtol=1e-9, atol=1e-9)
    ratio = shrinkage / (1 - shrinkage)
    theirs = ratio / (np.trace(within) / 16 + ratio)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=theirs).fit(x.numpy(), units.numpy())
    factor = (1 - theirs) / (1 - shrinkage)
    np.testing.assert_allclose(weight.numpy(), factor * peer.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), factor * (peer.intercept_ - np.log(0.1)), rtol=1e-6, atol=1e-8)
    new = torch.randn(200, 16, dtype=torch.float64) * 4
    np.testing.assert_array_equal((new @ weight.T + bias).argmax(1).numpy(), peer.predict(new.numpy()))


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_the_formula(tmp_path: Path, head: str) -> None:
    of = run(tmp_path, EXACT, THREE, {"strategy": {"name": "slda", "shrinkage": 0.01}}, HEADS[head])
    x, y = learned(of)  # the classes of three experiences are different ones
    means = {int(c): x[y == c].mean(0) for c in y.unique()}
    centred = x - torch.stack([means[int(c)] for c in y])
    precision = torch.linalg.inv(0.99 * centred.T @ centred / len(x) + 0.01 * torch.eye(x.shape[1]))
    weight = torch.cat([block.weight for block in of.model.head.blocks]).detach()
    bias = torch.cat([block.bias for block in of.model.head.blocks]).detach()
    compared = 0
    for u, (c, t) in enumerate(of.model.head.units):
        if c in means and t in (-1, 0, 1, 2):
            m = means[c]
            torch.testing.assert_close(weight[u], precision @ m, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(bias[u], -0.5 * m @ precision @ m, rtol=1e-7, atol=1e-7)
            compared += 1
        else:
            assert bias[u] < -1e29
    assert compared == 6


def test_the_order_of_samples_makes_no_difference(tmp_path: Path) -> None:
    x, units = samples(7)
    order = units.argsort()  # class after class
    one, other = filled(tmp_path, 0.1, x, units, 5), filled(tmp_path, 0.1, x[order], units[order], 9)
    for a, b in zip(one.outputs(), other.outputs(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_wholly_shrunk_it_is_the_nearest_mean(tmp_path: Path) -> None:
    x, units = samples(5)
    slda = filled(tmp_path, 1.0, x, units, 3)
    for a, b in zip(slda.outputs(), NCM.outputs(slda), strict=True):  # ty: ignore[invalid-argument-type]
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_shrinkage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.slda\.shrinkage: expected a number above 0 and up to 1, got 0"):
        opened(tmp_path, {"strategy": {"name": "slda", "shrinkage": 0.0}})
