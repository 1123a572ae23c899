"""The greedy sampler against its rules, and the network that learns from its memory alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import GDumb

from .helpers import LEARNED, WORLDS, begin, opened, same, weights
from .stepping import DOMAIN, EACH, HEADS, the, two_experiences


def filled(root: Path, size: int, experiences: int) -> Session:
    of = opened(root, {"strategy": {"name": "gdumb", "size": size}})
    for segment in of.segments[:experiences]:
        begin(of, segment)
    return of


def places(of: Session) -> list[tuple[int, int, int]]:
    """(experience, row, class) of every sample of the memory."""
    return [(e, r, c) for c, members in the(of, GDumb).members.items() for e, r in members]


@pytest.mark.parametrize("size", [7, 20, 100])
@pytest.mark.parametrize("experiences", [1, 2, 3])
def test_the_memory_is_balanced(tmp_path: Path, size: int, experiences: int) -> None:
    of = filled(tmp_path, size, experiences)
    held = places(of)
    counts = Counter(c for _, _, c in held)
    assert len(held) == size
    assert set(counts) == {c for e in of.stream.experiences[:experiences] for c in e.classes}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({r for _, r, _ in held}) == size
    for e, row, label in held:
        split = of.stream.experiences[e].train
        assert row in split.index.tolist()
        assert split.y is not None
        assert int(split.y[row]) == label


def test_a_class_at_its_share_takes_nothing_in(tmp_path: Path) -> None:
    """The same rules, one sample after the other, on the order that the run draws."""
    of = opened(tmp_path, {"strategy": {"name": "gdumb", "size": 30}})
    gdumb = the(of, GDumb)
    generator = torch.Generator()
    generator.set_state(gdumb.generator.get_state())
    memory: list[tuple[int, int]] = []  # (row, class), in order of arrival
    for e in (0, 1):
        begin(of, of.segments[e])
        split = of.stream.experiences[e].train
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), generator=generator, dtype=torch.float64).tolist()
        assert split.y is not None
        known = [c for c, _ in Counter(c for _, c in memory).items()]
        for i, draw in zip(order.tolist(), draws, strict=True):
            row = int(split.index[i])
            label = int(split.y[row])
            if label not in known:
                known.append(label)
            counts = {c: sum(1 for _, held in memory if held == c) for c in known}
            if counts[label] * len(known) >= 30:
                continue
            if len(memory) == 30:
                largest = next(c for c in known if counts[c] == max(counts.values()))
                of_it = [m for m in memory if m[1] == largest]
                memory.remove(of_it[int(draw * len(of_it))])
            memory.append((row, label))
        assert sorted(memory) == sorted((r, c) for _, r, c in places(of))


def test_a_segment_trains_on_the_memory_alone(tmp_path: Path) -> None:
    of = filled(tmp_path, 20, 3)
    data = the(of, GDumb).data(of.segments[2])
    assert [e.index for e in data] == [0, 1, 2]
    given = {(e.index, r) for e in data for r in e.train.index.tolist()}
    assert given == {(e, r) for e, r, _ in places(of)}
    assert all(e.train.x is of.stream.experiences[0].train.x for e in data)


def test_every_experience_begins_anew(tmp_path: Path) -> None:
    of = opened(tmp_path, {"strategy": "gdumb"})
    begin(of, of.segments[0])
    with torch.no_grad():
        for p in of.model.parameters():
            p.fill_(7.0)
    begin(of, of.segments[1])
    assert not any((p == 7.0).any() for p in of.model.parameters())


def test_state_goes_on_exactly(tmp_path: Path) -> None:
    of, other = filled(tmp_path / "a", 25, 2), opened(tmp_path / "b", {"strategy": {"name": "gdumb", "size": 25}})
    torch.save(the(of, GDumb).state_dict(), tmp_path / "gdumb.pt")
    for segment in other.segments[:2]:
        other.begin(segment)
    the(other, GDumb).load_state_dict(torch.load(tmp_path / "gdumb.pt", weights_only=True))
    for each in (of, other):
        begin(each, each.segments[2])
    assert places(of) == places(other)
    assert same(weights(of), weights(other))


@pytest.mark.parametrize(("head", "precision"), EACH)
def test_two_experiences(tmp_path: Path, head: str, precision: str) -> None:
    spec = {"name": "gdumb", "size": 30}
    of = two_experiences(tmp_path, {"strategy": spec}, HEADS[head], {"trainer": {"precision": precision}})
    assert len(the(of, GDumb)) == 30


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.gdumb: expected a stream with classes"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"strategy": "gdumb"})
    with pytest.raises(UserError, match=r"strategy\.gdumb: expected no 'expand'"):
        opened(tmp_path, {"strategy": ["expand", "gdumb"], "model": {"moe": LEARNED}})
