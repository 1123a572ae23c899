"""GEM's quadratic programme and its steps against other solvers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from cmoe.learners import Batch
from cmoe.session import Session
from cmoe.strategies import GEM
from cmoe.strategies.gem import mixture

from .helpers import opened
from .stepping import (
    EXACT,
    enter,
    gradients_of,
    leave,
    take,
    the,
    vector,
    walk,
)

SPEC = {"name": "gem", "size": 50, "margin": 0.3}


def by_descent(form: Tensor, products: Tensor, margin: float) -> Tensor:
    """The programme by bounded quasi-Newton instead of an active set."""
    p, q = form.numpy() + 1e-3 * np.eye(len(products)), products.numpy()
    found = minimize(
        lambda v: (0.5 * v @ p @ v + q @ v, p @ v + q),
        np.full(len(q), margin + 1.0),
        jac=True,
        bounds=[(margin, None)] * len(q),
        method="L-BFGS-B",
        options={"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("t", [1, 2, 5, 19])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_weights_solve_the_programme(t: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(t)
    old = torch.randn(t, 40, generator=generator, dtype=torch.float64)
    g = torch.randn(40, generator=generator, dtype=torch.float64)
    v = mixture(old @ old.T, old @ g, margin)
    torch.testing.assert_close(v, by_descent(old @ old.T, old @ g, margin), rtol=1e-4, atol=1e-5)
    assert float(v.min()) >= margin - 1e-12
    if margin == 0:
        # no old loss rises, but for what the ridge gives away
        assert float((old @ (g + v @ old)).min()) >= -1e-3 * float(v.max()) - 1e-9


def test_one_memory_has_a_closed_form() -> None:
    old, g = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([-1.0, 0.5]).double()
    v = mixture(old @ old.T, old @ g, 0.0)
    assert float(v) == pytest.approx(1.0 / (25 + 1e-3), rel=1e-12)
    assert float(mixture(old @ old.T, old @ g, 0.5)) == pytest.approx(0.5)


def at_third(root: Path) -> Session:
    of = opened(root, EXACT, {"strategy": SPEC})
    for e in (0, 1):
        enter(of, e)
        walk(of, e, range(8))
        leave(of, e)
    enter(of, 2)
    return of


def memories(of: Session) -> Tensor:
    """Gradients on the memory of each earlier experience, (2, P)."""
    held = the(of, GEM).held
    rows = []
    for e in (0, 1):
        mine = held["experience"] == e
        assert int(mine.sum()) == 10  # 50 samples for 5 experiences
        x = of.context.inputs(held["x"][mine], held["experience"][mine], None)
        rows.append(gradients_of(of, Batch(x, held["y"][mine], e, held["y"][mine], 10)))
    return torch.stack(rows)


def test_a_step_is_its_formula(tmp_path: Path) -> None:
    of = at_third(tmp_path)
    batch = take(of, 2, 0)
    g, old, before = gradients_of(of, batch), memories(of), vector(of)
    assert float((old @ g).min()) < -1e-3
    v = by_descent(old @ old.T, old @ g, 0.3)
    of.learner.step(batch)
    moved = (before - vector(of)) / 0.1
    torch.testing.assert_close(moved, g + v @ old, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(moved, g, rtol=1e-2)


def test_a_step_that_harms_nobody_stays(tmp_path: Path) -> None:
    of = at_third(tmp_path)
    held = the(of, GEM).held
    whole = of.context.inputs(held["x"], held["experience"], None)
    batch = Batch(whole, held["y"], 0, held["y"], len(held["y"]))  # the memories themselves
    g, before = gradients_of(of, batch), vector(of)
    assert float((memories(of) @ g).min()) > 0
    of.learner.step(batch)
    torch.testing.assert_close((before - vector(of)) / 0.1, g, rtol=1e-8, atol=1e-10)
