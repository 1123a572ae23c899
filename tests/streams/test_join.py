"""Streams one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cmoe.errors import UserError
from cmoe.plugins import Catalogue
from cmoe.streams import BatchScheduler, Stream, data_folder, open_stream
from cmoe.streams.join import join

CATALOGUE = Catalogue()


def digits(**options: object) -> Stream:
    return open_stream(
        {"name": "split_digits", **options}, CATALOGUE.find("task", "split_digits").load(), data_folder("."), 0
    )


@pytest.fixture
def more(tmp_path: Path) -> Stream:
    """Two classes of noise of the digits' shape."""
    random = np.random.default_rng(0)
    x = random.integers(0, 17, (40, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "more.npz", x=x, y=np.arange(40) % 2)
    task = CATALOGUE.find("task", "arrays").load()
    return open_stream({"name": "arrays", "path": "more.npz", "experiences": 1}, task, data_folder(tmp_path), 0)


def test_one_stream_stays_as_it_is() -> None:
    stream = digits()
    assert join([stream], 10) is stream


def test_experiences_follow_with_classes_of_their_own(more: Stream) -> None:
    first = digits()
    joined = join([first, more], 10)
    assert [e.index for e in joined.experiences] == list(range(6))
    assert joined.experiences[5].classes == (10, 11)
    assert joined.n_classes == 12
    assert len(joined.class_names) == 12
    assert joined.prefixes == (first.fingerprint,)
    assert joined.fingerprint not in (first.fingerprint, more.fingerprint)
    assert joined.segments == [(i,) for i in range(6)]


def test_samples_and_inputs_are_those_of_the_streams(more: Stream) -> None:
    first = digits()
    joined = join([first, more], 10)
    pairs = [*zip(joined.experiences[:5], first.experiences, strict=True), (joined.experiences[5], more.experiences[0])]
    for own, original in pairs:
        for name in ("train", "validation", "test"):
            a, b = getattr(own, name), getattr(original, name)
            assert torch.equal(a.raw(), b.raw())
            shift = own.classes[0] - original.classes[0]
            assert torch.equal(a.targets(), b.targets() + shift)
        stream = more if own.index == 5 else first
        raw = own.train.raw()[:3]
        expected = stream.transform(raw, original.index, train=False, generator=None)
        assert torch.equal(joined.transform(raw, own.index, train=False, generator=None), expected)
    mixed = torch.tensor([0, 5, 2])
    raw = torch.stack([joined.experiences[int(e)].train.raw()[0] for e in mixed])
    together = joined.transform(raw, mixed, train=False, generator=None)
    for row, e in enumerate(mixed.tolist()):
        alone = joined.transform(raw[row : row + 1], e, train=False, generator=None)
        assert torch.equal(together[row : row + 1], alone)


def test_a_scheduler_takes_experiences_of_both(more: Stream) -> None:
    joined = join([digits(), more], 10)
    loader = BatchScheduler([(e.train, e.index) for e in joined.experiences], joined.transform, batch_size=32)
    assert sum(sum(chunk.sizes) for chunk in loader) == sum(len(e.train) for e in joined.experiences)


def test_avalanche_sees_all_experiences(more: Stream) -> None:
    joined = join([digits(), more], 10)
    assert len(list(joined.benchmark.streams["train"])) == 6


def test_streams_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", x=np.zeros((20, 5), np.float32), y=np.arange(20) % 2)
    task = CATALOGUE.find("task", "arrays").load()
    flat = open_stream({"name": "arrays", "path": "flat.npz", "experiences": 1}, task, data_folder(tmp_path), 0)
    with pytest.raises(UserError, match=r"task arrays: expected the .* of 'split_digits'"):
        join([digits(), flat], 10)
