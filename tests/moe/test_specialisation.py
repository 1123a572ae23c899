"""Mutual information and purity against scikit-learn, and what must hold for every table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from cmoe.moe import diagnostics
from cmoe.moe.losses import mutual_information_loss

tables = st.integers(1, 5).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 9), min_size=m, max_size=m), min_size=1, max_size=4)
)


def labels(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A task and an expert for every single assignment."""
    tasks, experts = np.nonzero(counts)
    repeats = counts[tasks, experts]
    return tasks.repeat(repeats), experts.repeat(repeats)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables)
def test_information_is_that_of_scikit_learn(rows: list[list[int]]) -> None:
    counts = torch.tensor(rows)
    tasks, experts = labels(counts.numpy())
    found = diagnostics.mutual_information(counts)
    part = diagnostics.normalised_mutual_information(counts)
    if not len(tasks):
        assert math.isnan(found)
        assert math.isnan(part)
        return
    assert found == pytest.approx(mutual_info_score(tasks, experts), abs=1e-12)
    if min(len(set(tasks)), len(set(experts))) == 1:  # scikit-learn calls this 1 or 0, by convention
        assert math.isnan(part)
    else:
        assert part == pytest.approx(normalized_mutual_info_score(tasks, experts, average_method="min"), abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables, st.randoms(use_true_random=False))
def test_neither_names_nor_amounts_matter(rows: list[list[int]], random) -> None:
    counts = torch.tensor(rows)
    experts, tasks = list(range(counts.shape[1])), list(range(counts.shape[0]))
    random.shuffle(experts)
    random.shuffle(tasks)
    moved = counts[tasks][:, experts]
    for function in (diagnostics.mutual_information, diagnostics.normalised_mutual_information, diagnostics.purity):
        assert function(moved) == pytest.approx(function(counts), abs=1e-12, nan_ok=True)
        assert function(7 * counts) == pytest.approx(function(counts), abs=1e-12, nan_ok=True)
    torch.testing.assert_close(
        diagnostics.purity_of_experts(moved), diagnostics.purity_of_experts(counts)[experts], equal_nan=True
    )


def test_purity_is_the_share_of_the_main_task() -> None:
    counts = torch.tensor([[6, 0, 1, 0], [2, 3, 1, 0]])
    assert diagnostics.purity(counts) == pytest.approx((6 + 3 + 1) / 13)
    own = diagnostics.purity_of_experts(counts)
    assert own[:3].tolist() == pytest.approx([6 / 8, 1.0, 0.5])
    assert own[3].isnan()
    assert diagnostics.purity(torch.tensor([[4, 4], [4, 4]])) == pytest.approx(0.5)  # 1 / M: no specialisation
    assert math.isnan(diagnostics.purity(torch.zeros(0, 3)))
    assert diagnostics.purity_of_experts(torch.zeros(0, 3)).isnan().all()


def test_an_expert_for_each_task_tells_everything() -> None:
    counts = torch.diag(torch.tensor([5, 5, 5, 5]))
    assert diagnostics.mutual_information(counts) == pytest.approx(math.log(4))
    assert diagnostics.normalised_mutual_information(counts) == pytest.approx(1.0)
    assert diagnostics.purity(counts) == pytest.approx(1.0)
    shared = torch.tensor([[5, 0], [5, 0], [0, 5]])  # fewer experts than tasks: the task still tells the expert
    assert diagnostics.normalised_mutual_information(shared) == pytest.approx(1.0)


def test_it_is_what_the_loss_of_mod_squad_raises() -> None:
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0])
    tasks = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    counts = torch.zeros(2, 3).index_put((tasks, ids), torch.ones(8), accumulate=True)
    loss = mutual_information_loss(torch.nn.functional.one_hot(ids, 3).double(), tasks)
    assert diagnostics.mutual_information(counts) == pytest.approx(-loss.item())
