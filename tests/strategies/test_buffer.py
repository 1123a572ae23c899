"""The memory: fair, like its published algorithm, and exact after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.learners import Batch, Output
from cmoe.session import Session
from cmoe.strategies import Replay
from cmoe.strategies.buffer import Buffer

from .helpers import opened, run

POLICIES = ("reservoir", "class_balanced")


def buffer(size: int, policy: str, seed: int = 0) -> Buffer:
    return Buffer(size, policy, torch.Generator().manual_seed(seed))


def labels(n: int, seed: int = 0) -> Tensor:
    """Classes 0 … 5, class c about 2^c times as often as class 0, later ones rather later."""
    generator = torch.Generator().manual_seed(seed)
    weights = 2.0 ** torch.arange(6)
    order = torch.multinomial(weights.expand(n, -1), 1, generator=generator).squeeze(1)
    return order[(order + 6 * torch.rand(n, generator=generator)).argsort()]


def feed(of: Buffer, y: Tensor, sizes: list[int] | int) -> list[int]:
    """Samples that are their own number, in batches; the places that were given."""
    places: list[int] = []
    x = torch.arange(len(y)).unsqueeze(1)
    for rows in torch.arange(len(y)).split(sizes):
        given = of.places(y[rows])
        kept = [(p, int(r)) for p, r in zip(given, rows, strict=True) if p >= 0]
        if kept:
            to, chosen = [p for p, _ in kept], torch.tensor([r for _, r in kept])
            of.write(to, x[chosen], y[chosen], chosen % 7)
        places += given
    return places


def held(of: Buffer) -> list[int]:
    return of.x[: len(of)].flatten().tolist()


def chi_square(counts: Tensor, expected: float, degrees: int) -> float:
    """Probability of counts that are at least as uneven."""
    from scipy.stats import chi2

    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), degrees))


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_every_sample_seen_is_equally_likely_held(batch: int) -> None:
    n, size, repeats = 40, 10, 1500
    of = buffer(size, "reservoir")
    counts = torch.zeros(n)
    y = torch.zeros(n, dtype=torch.int64)
    for _ in range(repeats):
        fresh = buffer(size, "reservoir")
        fresh.generator = of.generator
        feed(fresh, y, batch)
        assert len(set(held(fresh))) == size
        counts[held(fresh)] += 1
    # held samples are drawn without replacement: the variance is that of a multinomial times (1 - size/n)
    shrunk = (counts - repeats * size / n) / (1 - size / n) ** 0.5 + repeats * size / n
    assert chi_square(shrunk, repeats * size / n, n - 1) > 1e-3


def reservoir(y: list[int], size: int, draws: list[float]) -> list[int]:
    """Vitter's algorithm R, one sample at a time."""
    places = []
    for seen, draw in enumerate(draws):
        place = seen if seen < size else int(draw * (seen + 1))
        places.append(place if place < size else -1)
    assert len(places) == len(y)
    return places


@pytest.mark.parametrize("sizes", [1, 3, 50])
def test_reservoir_is_algorithm_r(sizes: int) -> None:
    of, twin = buffer(8, "reservoir"), torch.Generator().manual_seed(0)
    y = labels(50)
    draws = [d for part in y.split(sizes) for d in torch.rand(len(part), generator=twin, dtype=torch.float64).tolist()]
    expected = reservoir(y.tolist(), 8, draws)
    assert feed(of, y, sizes) == expected
    content: dict[int, int] = {p: i for i, p in enumerate(expected) if p >= 0}
    assert held(of) == [content[p] for p in range(8)]
    assert of.seen == 50
    assert min(expected) == -1


class Balanced:
    """Chrysakis & Moens 2020, algorithm 1, on lists of (sample, class), as they write it."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.memory: list[tuple[int, int]] = []
        self.stored_order: dict[int, list[int]] = {}
        self.met: dict[int, int] = {}
        self.full: set[int] = set()

    def take(self, sample: int, label: int) -> None:
        u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        self.met[label] = self.met.get(label, 0) + 1
        mine = self.stored_order.setdefault(label, [])
        if len(self.memory) < self.size:
            mine.append(len(self.memory))
            self.memory.append((sample, label))
            return
        counts = {c: sum(k == c for _, k in self.memory) for c in self.met}
        largest = min(c for c in counts if counts[c] == max(counts.values()))
        self.full |= {c for c in counts if counts[c] == max(counts.values())}
        if label not in self.full:
            others = self.stored_order[largest]
            place = others.pop(int(u * len(others)))
            mine.append(place)
            self.memory[place] = (sample, label)
        elif u * self.met[label] < counts[label]:  # with probability stored / met
            self.memory[mine[int(u * self.met[label])]] = (sample, label)


@pytest.mark.parametrize("sizes", [1, 7, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_class_balanced_is_its_algorithm(sizes: int, seed: int) -> None:
    of, theirs = buffer(20, "class_balanced", seed), Balanced(20, torch.Generator().manual_seed(seed))
    y = labels(300, seed)
    feed(of, y, sizes)
    for i, label in enumerate(y.tolist()):
        theirs.take(i, label)
    assert held(of) == [sample for sample, _ in theirs.memory]
    assert of.y[: len(of)].tolist() == [label for _, label in theirs.memory]
    assert of.class_seen == theirs.met


def test_class_balanced_balances() -> None:
    """A class keeps as many as it can, up to an equal share; the reservoir follows the stream instead."""
    y = labels(2000)
    balanced, plain = buffer(60, "class_balanced"), buffer(60, "reservoir")
    for of in (balanced, plain):
        feed(of, y, 10)
    counts = torch.bincount(balanced.y[:60], minlength=6)
    assert counts.max() - counts.min() <= 2
    assert torch.bincount(plain.y[:60], minlength=6).max() > 20


def test_within_a_full_class_every_sample_is_equally_likely() -> None:
    """Two classes, 10 places: 5 each of 20 and of 20."""
    y = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(0)
    counts, repeats = torch.zeros(40), 1500
    for _ in range(repeats):
        fresh = buffer(10, "class_balanced")
        fresh.generator = generator
        feed(fresh, y, 8)
        counts[held(fresh)] += 1
    shrunk = (counts - repeats / 4) / 0.75**0.5 + repeats / 4
    assert chi_square(shrunk, repeats / 4, 38) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_places_and_members_agree(policy: str) -> None:
    of, y = buffer(15, policy), labels(200)
    feed(of, y, 9)
    assert [y[i] for i in held(of)] == of.y[:15].tolist()
    assert [i % 7 for i in held(of)] == of.experience[:15].tolist()
    if policy == "class_balanced":
        assert sorted(p for m in of._members.values() for p in m) == list(range(15))
        assert all(int(of.y[p]) == c for c, m in of._members.items() for p in m)


def test_of_two_in_one_place_the_later_stays() -> None:
    of = buffer(4, "reservoir")
    x, y = torch.tensor([[1], [2], [3], [4]]), torch.tensor([5, 6, 7, 8])
    of.write([3, 0, 3, 0], x, y, torch.arange(4))
    assert of.x.flatten().tolist() == [4, 0, 0, 3]
    assert of.y.tolist() == [8, 0, 0, 7]
    assert of.experience.tolist() == [3, 0, 0, 2]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seen", [0, 5, 200])
def test_after_a_restart_everything_goes_on_as_it_would_have(policy: str, seen: int, tmp_path: Path) -> None:
    # 13 places for 6 classes: some are full and not the largest any more
    of, y = buffer(13, policy), torch.randint(0, 6, (400,), generator=torch.Generator().manual_seed(1))
    feed(of, y[:seen], 7)
    of.draw(4)
    torch.save(of.state_dict(), tmp_path / "buffer.pt")
    other = buffer(13, policy, seed=99)
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert (other.seen, len(other), other.class_seen) == (of.seen, len(of), of.class_seen)
    assert of.seen == seen
    for one in (of, other):
        feed(one, y[seen:], 6)
    for a, b in zip(of.draw(5), other.draw(5), strict=True):
        assert torch.equal(a, b)
    assert held(of) == held(other)
    assert (of._members, of._full, of.class_seen) == (other._members, other._full, other.class_seen)


def test_draws_are_without_replacement_and_fair() -> None:
    of = buffer(10, "reservoir")
    feed(of, torch.zeros(30, dtype=torch.int64), 30)
    counts = torch.zeros(30)
    for _ in range(1000):
        drawn = of.draw(4)[0].flatten()
        assert len(drawn.unique()) == 4
        counts[drawn] += 1
    assert chi_square((counts[held(of)] - 400) / 0.6**0.5 + 400, 400, 9) > 1e-3
    assert sorted(of.draw(10)[0].flatten().tolist()) == sorted(of.draw(99)[0].flatten().tolist()) == sorted(held(of))


def replay_of(of: Session) -> Replay:
    (found,) = (s for s in of.strategies if isinstance(s, Replay))
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stream", ["split_digits", "tiny_text"])
def test_what_is_held_is_what_the_stream_has(tmp_path: Path, policy: str, stream: str) -> None:
    model = {} if stream == "split_digits" else {"model": {"name": "text_encoder", "dim": 16, "heads": 2, "depth": 1}}
    spec = {"name": "replay", "size": 30, "policy": policy}
    of = run(tmp_path, {"strategy": spec, "stream": {"name": stream}, "trainer": {"max_steps": 8}}, model)
    memory = replay_of(of).buffer
    trained = sum(min(8 * 16, len(e.train)) for e in of.stream.experiences)
    assert (len(memory), memory.seen) == (30, trained)
    for x, y, e in zip(memory.x, memory.y.tolist(), memory.experience.tolist(), strict=True):
        train = of.stream.experiences[e].train
        same = (train.raw() == x).flatten(1).all(1)
        targets = train.targets()
        assert targets is not None
        assert y in targets[same].tolist()
        assert y in of.stream.experiences[e].classes
    assert len(set(memory.experience.tolist())) > 1
    if policy == "class_balanced":
        counts = torch.bincount(memory.y)
        assert counts[counts > 0].max() - counts[counts > 0].min() <= 2


def test_one_decision_per_incoming_sample_after_the_step(tmp_path: Path) -> None:
    """Drawn samples are not offered again, and the first batch sees no memory."""
    of = opened(tmp_path, {"strategy": {"name": "replay", "size": 50, "batch": 9}})
    replay, e = replay_of(of), of.stream.experiences[0].train
    ids, y = e.index[:20], e.targets()
    assert y is not None
    x = of.stream.transform(e.x[ids], 0, train=True, generator=None)
    batch = Batch(x, y[:20], 0, ids, 20)
    assert replay.extend_batch(batch) is batch
    nothing = Output(torch.zeros(1), torch.zeros(1), {})
    replay.after_step(batch, nothing)
    extended = replay.extend_batch(batch)
    assert (len(extended.x), extended.incoming) == (29, 20)
    assert torch.equal(extended.x[:20], x)
    rows = [int((x == one).flatten(1).all(1).nonzero()[0]) for one in extended.x[20:]]
    assert extended.y[20:].tolist() == y[rows].tolist()
    replay.after_step(extended, nothing)
    assert replay.buffer.seen == 40


def test_a_sample_of_another_experience_gets_that_ones_transform(tmp_path: Path, shared_data: Path) -> None:
    from cmoe.api import new_run, plan_of
    from cmoe.streams.data import data_folder

    config = {
        "stream": {"name": "permuted_mnist", "experiences": 3},
        "strategy": {"name": "replay", "size": 20, "batch": 20},
        "trainer": {"threads": 1},
        "tracking": {"enabled": False, "root": str(tmp_path)},
        "evaluation": {"initial": False},
    }
    plan, catalogue = plan_of(config)
    of = Session(plan, new_run(plan), catalogue, data_folder(shared_data))
    of.open()
    replay, train = replay_of(of), of.stream.experiences[1].train
    y = train.targets()
    assert y is not None
    x = of.stream.transform(train.x[train.index[:6]], 1, train=True, generator=None)
    batch = Batch(x, y[:6], 1, train.index[:6], 6)
    replay.after_step(batch, Output(torch.zeros(1), torch.zeros(1), {}))
    later = replay.extend_batch(Batch(x, y[:6], 2, train.index[:6], 6))
    assert torch.equal(later.x[6:], x)
    assert isinstance(later.task, Tensor)
    assert later.task.tolist() == [2] * 6 + [1] * 6


def test_language_is_held_and_drawn_as_windows(tmp_path: Path) -> None:
    world = {
        "stream": {"name": "tiny_bytes", "scenario": "domain"},
        "model": {"name": "byte_lm", "dim": 16, "heads": 2},
    }
    of = run(tmp_path, world, {"strategy": {"name": "replay", "size": 10, "batch": 4}, "trainer": {"max_steps": 3}})
    memory = replay_of(of).buffer
    assert memory.x.shape == (10, 13)
    for x, e in zip(memory.x, memory.experience.tolist(), strict=True):
        assert bool((of.stream.experiences[e].train.raw() == x).all(1).any())
    train = of.stream.experiences[0].train.raw().long()
    batch = Batch(train[:2, :-1], train[:2, 1:], 0, torch.arange(2), 2)
    extended = replay_of(of).extend_batch(batch)
    assert extended.x.shape == extended.y.shape == (6, 12)
    assert torch.equal(extended.x[2:, 1:], extended.y[2:, :-1])


def test_language_has_no_classes_to_balance(tmp_path: Path) -> None:
    world = {
        "stream": {"name": "tiny_bytes", "scenario": "domain"},
        "model": {"name": "byte_lm", "dim": 16, "heads": 2},
    }
    with pytest.raises(UserError, match=r"replay\.policy: expected 'reservoir'"):
        opened(tmp_path, world, {"strategy": {"name": "replay", "policy": "class_balanced"}})
