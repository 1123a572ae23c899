"""Batches in chunks: complete, and restored from their position alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.streams import Augment, BatchScheduler, Chain, Permute, Scale, Split, Tokens

TABLE = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(t)) for t in range(3)])
X = torch.arange(50 * 12).remainder(255).to(torch.uint8).reshape(50, 1, 3, 4)
Y = torch.arange(50) % 5
ONE = [(Split(X, torch.arange(50), Y), 1)]
TWO = [(Split(X, torch.arange(5, 30), Y), 0), (Split(X, torch.arange(20, 50), Y + 7), 2)]
TEXT = torch.arange(50 * 9).remainder(256).to(torch.int16).reshape(50, 9)
LANGUAGE = [(Split(TEXT, torch.arange(50), None), 0)]

KINDS = {
    "one": lambda chunk: BatchScheduler(ONE, Scale(), batch_size=7, epochs=3, chunk=chunk, seed=4),
    "union": lambda chunk: BatchScheduler(TWO, Chain(Permute(TABLE), Scale()), batch_size=8, epochs=2, chunk=chunk),
    "augmented": lambda chunk: BatchScheduler(TWO, Chain(Augment(1), Scale()), batch_size=8, epochs=2, chunk=chunk),
    "steps": lambda chunk: BatchScheduler(ONE, Scale(), batch_size=7, epochs=9, max_steps=19, chunk=chunk),
    "online": lambda chunk: BatchScheduler(
        ONE, Scale(), batch_size=4, epochs=2, chunk=chunk, parts=[10, 10, 10, 10, 7, 3]
    ),
    "dropped": lambda chunk: BatchScheduler(ONE, Scale(), batch_size=7, epochs=2, chunk=chunk, drop_last=True),
    "language": lambda chunk: BatchScheduler(LANGUAGE, Tokens(), batch_size=7, epochs=2, chunk=chunk),
}


def batches(scheduler: BatchScheduler) -> list[tuple[Tensor, ...]]:
    return [batch for c in scheduler for batch in zip(c.x, c.y, c.task, c.ids, strict=True)]


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(t, u) for p, q in zip(a, b, strict=True) for t, u in zip(p, q, strict=True)
    )


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest):
    return KINDS[request.param]


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_resumed_anywhere_the_rest_is_the_same(make, chunk: int) -> None:
    whole = make(chunk)
    expected, total = batches(whole), len(whole)
    for stop in range(total):
        first = make(chunk)
        got = []
        for i, c in enumerate(first):
            if i == stop:
                break
            got += list(zip(c.x, c.y, c.task, c.ids, strict=True))
        else:
            raise AssertionError("it ended early")
        # the state as it was before the chunk that was handed out and never trained on
        before = make(chunk)
        for _ in zip(range(stop), before, strict=False):
            pass
        state = before.state_dict()
        assert state["done"] == len(got)
        second = make(5)
        second.load_state_dict(state)
        chunks = len(second)
        assert same(got + batches(second), expected)
        assert sum(1 for _ in reloaded(make(5), state)) == chunks
        assert same(batches(second), expected), "afterwards it starts afresh"


def reloaded(scheduler: BatchScheduler, state: dict[str, int]) -> BatchScheduler:
    scheduler.load_state_dict(state)
    return scheduler


def test_chunk_sizes_change_nothing(make) -> None:
    assert same(batches(make(1)), batches(make(32)))


def test_length_holds_while_iterating(make) -> None:
    scheduler = make(3)
    assert len(scheduler) == sum(1 for _ in scheduler)
    for _ in scheduler:
        assert len(scheduler) == len(make(3))
    assert scheduler.steps == len(batches(scheduler))


def test_an_abandoned_iteration_does_not_spoil_a_loaded_position() -> None:
    scheduler = KINDS["one"](3)
    iterator = iter(scheduler)
    next(iterator)
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    del iterator
    assert next(iter(scheduler)).first == 3
    assert next(iter(scheduler)).first == 0


def test_each_epoch_visits_every_sample_once() -> None:
    for name, splits, epochs in (("one", ONE, 3), ("union", TWO, 2), ("online", ONE, 2), ("language", LANGUAGE, 2)):
        seen = [(int(i), int(e)) for _, _, t, ids in batches(KINDS[name](4)) for i, e in zip(ids, t, strict=True)]
        assert sorted(seen) == sorted([(int(i), e) for s, e in splits for i in s.index] * epochs)


def test_inputs_belong_to_their_samples_and_labels() -> None:
    transform = Chain(Permute(TABLE), Scale())
    for x, y, task, ids in batches(KINDS["union"](4)):
        for i in range(len(ids)):
            raw = X[ids[i]][None]
            assert torch.equal(x[i], transform(raw, int(task[i]), train=True)[0])
            assert y[i] == Y[ids[i]] + (7 if task[i] == 2 else 0)


def test_epochs_seeds_phases_and_experiences_differ_in_order() -> None:
    def order(**key: Any) -> tuple[int, ...]:
        scheduler = BatchScheduler(ONE, Scale(), batch_size=50, epochs=2, **key)
        return tuple(torch.cat([i for c in scheduler for i in c.ids]).tolist())

    orders = [order(), order(seed=1), order(experience=1), order(phase=1)]
    assert len({o[:50] for o in orders} | {orders[0][50:]}) == 5
    assert order() == order()


def test_small_experiences_come_in_order() -> None:
    seen = [i for _, _, _, ids in batches(KINDS["online"](32)) for i in ids.tolist()]
    assert seen[:10] == list(range(10))
    assert sorted(seen[10:20]) == list(range(10))
    assert seen[20:30] == list(range(10, 20))


def test_language_targets_are_the_next_tokens() -> None:
    for x, y, _, ids in batches(KINDS["language"](4)):
        assert torch.equal(x, TEXT[ids][:, :-1].long())
        assert torch.equal(y, TEXT[ids][:, 1:].long())


def test_last_batch_is_kept_or_dropped() -> None:
    assert [len(b[3]) for b in batches(KINDS["one"](32))][:8] == [7] * 7 + [1]
    assert {len(b[3]) for b in batches(KINDS["dropped"](32))} == {7}


def test_steps_are_limited_and_epochs_counted() -> None:
    chunks = list(KINDS["steps"](32))
    assert sum(map(len, chunks)) == 19
    assert [c.epoch for c in chunks] == [0, 1, 2]
    assert [c.first for c in chunks] == [0, 8, 16]


def test_one_experience_is_said_once() -> None:
    assert {c.experience for c in KINDS["one"](4)} == {1}
    assert {c.experience for c in KINDS["union"](4)} == {None}


def test_a_chunk_moves_in_one_piece() -> None:
    chunk = next(iter(KINDS["union"](4)))
    assert chunk.to("cpu") is chunk
    moved = chunk.to("meta")
    assert [x.shape for x in moved.x] == [x.shape for x in chunk.x]
    assert all(x.device.type == "meta" for x in moved.x)


def test_large_samples_make_small_chunks() -> None:
    x = torch.zeros(64, 3, 128, 128, dtype=torch.uint8)
    scheduler = BatchScheduler([(Split(x, torch.arange(64), torch.zeros(64).long()), 0)], Scale(), batch_size=8)
    assert [len(c) for c in scheduler] == [5, 3]
    assert scheduler.steps == 8


def test_positions_of_other_data_are_refused() -> None:
    with pytest.raises(AssertionError):
        KINDS["one"](4).load_state_dict({"pass": 0, "step": 0, "done": 0, "samples": 49})
