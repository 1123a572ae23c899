"""Outputs and what they stand for, against the obvious loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmoe.learners import Head

SHARED = [([0, 1, 2, 3, 4], -1)]
GROWING = [([7, 2], -1), ([5], -1), ([0, 3], -1)]
MULTI = [([7, 2], 0), ([5, 0, 3], 1), ([2, 7], 3)]  # tasks 0 and 3 have the same classes, 2 is not there
CASES = {"shared": SHARED, "growing": GROWING, "multi": MULTI}


def head(kind: str) -> Head:
    torch.manual_seed(0)
    made = Head(6, kind)
    for classes, task in CASES[kind]:
        made.add(classes, task)
    return made


def units(kind: str) -> list[tuple[int, int]]:
    return [(c, t) for classes, t in CASES[kind] for c in classes]


@pytest.mark.parametrize("kind", CASES)
def test_logits_are_those_of_the_blocks_in_order(kind: str) -> None:
    made, x = head(kind), torch.randn(3, 6)
    expected = torch.cat([F.linear(x, *b.parameters()) for b in made.blocks], 1)
    torch.testing.assert_close(made(x), expected)
    assert made(torch.randn(2, 5, 6)).shape == (2, 5, len(units(kind)))
    assert len(made) == len(units(kind))
    assert made.unit_classes().tolist() == [c for c, _ in units(kind)]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("classes", [[], [2], [7, 3], [5, 0, 3], [9], list(range(10))])
@pytest.mark.parametrize("task", [None, 0, 1, 2, 3])
def test_columns(kind: str, classes: list[int], task: int | None) -> None:
    expected = [u for u, (c, t) in enumerate(units(kind)) if c in classes and (task is None or t in (-1, task))]
    found = head(kind).columns(classes, task)
    if len(expected) == len(units(kind)):
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == expected


@pytest.mark.parametrize("kind", CASES)
def test_targets(kind: str) -> None:
    made = head(kind)
    for task in sorted({t for _, t in units(kind)}):
        own = [(u, c) for u, (c, t) in enumerate(units(kind)) if t == task]
        y = torch.tensor([c for _, c in own])
        assert made.targets(y, max(task, 0)).tolist() == [u for u, _ in own]
    pairs = [(c, max(t, 0)) for c, t in units(kind)][::-1]
    y, task_of = (torch.tensor(v) for v in zip(*pairs, strict=True))
    assert made.targets(y, task_of).tolist() == list(range(len(pairs)))[::-1]


def test_a_class_that_a_task_does_not_have_has_no_target() -> None:
    assert head("multi").targets(torch.tensor([5, 7]), torch.tensor([0, 3])).tolist() == [-1, 6]


def test_own_task() -> None:
    expected = [[t == task for _, t in units("multi")] for task in range(4)]
    assert head("multi").own_task().tolist() == expected


def test_tables_follow_what_is_added() -> None:
    made = head("growing")
    assert made.columns([0, 1, 2, 3, 5, 7]) is None
    made.add([1, 9])
    assert made.columns([1]) is not None
    assert made.targets(torch.tensor([9, 7]), 0).tolist() == [6, 0]
    assert made.columns([0, 1, 2, 3, 5, 7, 9]) is None


@pytest.mark.parametrize(
    ("blocks", "identity"), [([[0, 1, 2]], True), ([[0, 1], [2]], True), ([[1, 0]], False), ([[0, 2]], False)]
)
def test_identity(blocks: list[list[int]], identity: bool) -> None:
    made = Head(3, "growing")
    for classes in blocks:
        made.add(classes)
    assert made.is_identity() == identity


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("before", [[], [0], [1], [0, 1]])
def test_restored_outputs_keep_what_is_the_same(kind: str, before: list[int]) -> None:
    """Whatever blocks are there already, the structure and the logits are those that were saved."""
    saved, made = head(kind), Head(6, kind).double()
    for i in before:
        if i < len(CASES[kind]):
            made.add(*CASES[kind][i])
    made.restore_structure(saved.structure())
    assert made.structure() == saved.structure()
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    made.load_state_dict(saved.double().state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(made(x), saved(x))
    mine, theirs = made.columns([2, 3]), saved.columns([2, 3])
    assert mine is not None
    assert theirs is not None
    assert mine.tolist() == theirs.tolist()


def test_a_block_that_is_there_keeps_its_weights() -> None:
    made = head("growing")
    first = made.blocks[0]
    made.restore_structure({"classes": [[7, 2], [5], [1]], "tasks": [-1, -1, -1]})
    assert made.blocks[0] is first
    assert [len(c) for c in made.block_classes] == [2, 1, 1]
    assert made(torch.randn(2, 6)).shape == (2, 4)


@pytest.mark.parametrize("kind", CASES)
def test_a_structure_says_which_kind_of_head_it_is(kind: str) -> None:
    """`head: auto` is decided by the stream; to predict there is one without samples, which may decide otherwise."""
    made = Head(6, "multi" if kind != "multi" else "shared")
    made.restore_structure(head(kind).structure())
    assert made.kind == kind
