"""The nearest class mean against its formula and against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from cmoe.session import Session
from cmoe.strategies import NCM
from cmoe.streams import Split

from .helpers import run
from .stepping import EXACT, HEADS, the

THREE = {"stream": {"limit": 3}, "trainer": {"max_steps": 8}}


def features(of: Session, split: Split, experience: int) -> Tensor:
    """Of a split's samples, (N, D) float64."""
    of.model.eval()
    x = of.context.inputs(split.raw(), torch.full((len(split),), experience), None, train=False)
    found = of.model(x, of.context.route(experience)).features.detach()
    of.model.train()
    return found


def learned(of: Session) -> tuple[Tensor, Tensor]:
    """Features and classes of all training samples so far."""
    splits = [(s.last, of.stream.experiences[s.last].train) for s in of.segments]
    y = [split.targets() for _, split in splits]
    return torch.cat([features(of, split, e) for e, split in splits]), torch.cat([c for c in y if c is not None])


@pytest.mark.parametrize("head", ["shared", "growing", "experts"])
def test_it_is_the_nearest_centroid(tmp_path: Path, head: str) -> None:
    of = run(tmp_path, EXACT, THREE, {"strategy": "ncm"}, HEADS[head])
    x, y = learned(of)
    peer = NearestCentroid().fit(x.numpy(), y.numpy())
    classes = of.model.head.unit_classes().tolist()
    units = torch.tensor([classes.index(c) for c in peer.classes_])
    ncm = the(of, NCM)
    np.testing.assert_allclose(ncm.mean[units].numpy(), peer.centroids_, rtol=1e-10, atol=1e-12)
    for segment in of.segments:
        at_test = features(of, of.stream.experiences[segment.last].test, segment.last)
        logits = of.model.head(at_test)
        mine = of.model.head.unit_classes()[logits.argmax(1)]
        np.testing.assert_array_equal(mine.numpy(), peer.predict(at_test.numpy()))
        column = of.record.rows[2].columns[segment.last]
        assert column.pred is not None
        np.testing.assert_array_equal(column.pred, mine.numpy())


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_distances(tmp_path: Path, head: str) -> None:
    """But for ½ ‖x‖², which all outputs share."""
    of = run(tmp_path, EXACT, THREE, {"strategy": "ncm"}, HEADS[head])
    for e in range(3):
        split = of.stream.experiences[e].train
        x, y = features(of, split, e), split.targets()
        assert y is not None
        test = features(of, of.stream.experiences[e].test, e)
        logits = of.model.head(test).detach()
        for u, (c, t) in enumerate(of.model.head.units):
            if c in y.tolist() and (t in (-1, e)):
                distance = (test - x[y == c].mean(0)).square().sum(1)
                expected = -0.5 * distance + 0.5 * test.square().sum(1)
                torch.testing.assert_close(logits[:, u], expected, rtol=1e-9, atol=1e-9)


def test_classes_without_samples_are_never_chosen(tmp_path: Path) -> None:
    of = run(tmp_path, THREE, {"strategy": "ncm", "evaluation": {"rows": "all"}})
    for e, column in of.record.rows[0].columns.items():
        assert column.pred is not None
        assert set(column.pred.tolist()) <= set(of.stream.experiences[0].classes), e
    assert all(v.isfinite().all() for v in of.model.state_dict().values())
