"""Every metric against figures worked out by hand, and properties that hold for all matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cmoe import metrics as m

R = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 0.7]])
B = np.array([0.1, 0.1, 0.2])
N = np.array([10.0, 20.0, 30.0])

BY_HAND = {
    "acc_macro": (lambda: m.acc_macro(R), 1.7 / 3),
    "acc_micro": (lambda: m.acc_micro(R, N), (6 + 8 + 21) / 60),
    "bwt_gem": (lambda: m.bwt_gem(R), ((0.6 - 0.9) + (0.4 - 0.8)) / 2),
    "fwt_gem": (lambda: m.fwt_gem(R, B), ((0.2 - 0.1) + (0.3 - 0.2)) / 2),
    "forgetting_chaudhry": (lambda: m.forgetting_chaudhry(R), ((0.9 - 0.6) + (0.8 - 0.4)) / 2),
    "forgetting_first_minus_last": (lambda: m.forgetting_first_minus_last(R), 0.35),
    "avg_incremental_acc": (lambda: m.avg_incremental_acc(R, N), (0.9 + (5 + 16) / 30 + 35 / 60) / 3),
    "avg_incremental_acc_macro": (lambda: m.avg_incremental_acc_macro(R), (0.9 + 0.65 + 1.7 / 3) / 3),
    "learning_accuracy": (lambda: m.learning_accuracy(R), 0.8),
    "acc_diaz": (lambda: m.acc_diaz(R), (0.9 + 0.5 + 0.8 + 0.6 + 0.4 + 0.7) / 6),
    "bwt_diaz": (lambda: m.bwt_diaz(R), ((0.5 - 0.9) + (0.6 - 0.9) + (0.4 - 0.8)) / 3),
    "rem": (lambda: m.rem(R), 1 - 1.1 / 3),
    "bwt_plus": (lambda: m.bwt_plus(R), 0.0),
    "fwt_diaz": (lambda: m.fwt_diaz(R), (0.2 + 0.1 + 0.3) / 3),
    "transfer": (lambda: m.transfer(R), (0.2 + (0.1 + 0.3) / 2) / 2),
    "average": (lambda: m.average(R), R.sum() / 9),
    "last": (lambda: m.last(R), 1.7 / 3),
    "intransigence": (lambda: m.intransigence(R, np.array([0.9, 0.9, 0.8])), (0.0 + 0.1 + 0.1) / 3),
    "min_acc": (
        lambda: m.min_acc(R, [(1, np.array([0.3, 0.5, 0.0])), (2, np.array([0.55, 0.1, 0.2]))]),
        (0.3 + 0.1) / 2,
    ),
    "wc_acc": (
        lambda: m.wc_acc(R, [(1, np.array([0.3, 0.5, 0.0])), (2, np.array([0.55, 0.1, 0.2]))]),
        0.7 / 3 + 2 / 3 * 0.2,
    ),
    "recency_bias": (
        lambda: m.recency_bias([np.array([0, 4, 5, 1]), np.array([4, 2]), np.array([4, 4])], [(0, 1), (2, 3), (4, 5)]),
        3 / 6,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    function, expected = BY_HAND[name]
    assert function() == pytest.approx(expected, abs=1e-12)


def test_chaudhry_forgetting_may_be_negative_and_counts_rows_before_learning():
    better = np.array([[0.5, 0.1, 0.1], [0.6, 0.5, 0.1], [0.9, 0.9, 0.5]])
    assert m.forgetting_chaudhry(better) == pytest.approx(((0.6 - 0.9) + (0.5 - 0.9)) / 2)
    zero_shot = np.array([[0.9, 0.9], [0.9, 0.4]])
    assert m.forgetting_chaudhry(zero_shot) == pytest.approx(0.0)


NEEDS = {
    "acc_macro": (lambda R: m.acc_macro(R), {(3, j) for j in range(4)}),
    "acc_micro": (lambda R: m.acc_micro(R, np.ones(4)), {(3, j) for j in range(4)}),
    "bwt_gem": (lambda R: m.bwt_gem(R), {(3, 0), (3, 1), (3, 2), (0, 0), (1, 1), (2, 2)}),
    "fwt_gem": (lambda R: m.fwt_gem(R, np.zeros(4)), {(0, 1), (1, 2), (2, 3)}),
    "forgetting_chaudhry": (lambda R: m.forgetting_chaudhry(R), {(i, j) for i in range(4) for j in range(3)}),
    "forgetting_first_minus_last": (
        lambda R: m.forgetting_first_minus_last(R),
        {(3, 0), (3, 1), (3, 2), (0, 0), (1, 1), (2, 2)},
    ),
    "avg_incremental_acc": (
        lambda R: m.avg_incremental_acc(R, np.ones(4)),
        {(i, j) for i in range(4) for j in range(i + 1)},
    ),
    "avg_incremental_acc_macro": (
        lambda R: m.avg_incremental_acc_macro(R),
        {(i, j) for i in range(4) for j in range(i + 1)},
    ),
    "learning_accuracy": (lambda R: m.learning_accuracy(R), {(i, i) for i in range(4)}),
    "acc_diaz": (lambda R: m.acc_diaz(R), {(i, j) for i in range(4) for j in range(i + 1)}),
    "bwt_diaz": (lambda R: m.bwt_diaz(R), {(i, j) for i in range(4) for j in range(i + 1)} - {(3, 3)}),
    "rem": (lambda R: m.rem(R), {(i, j) for i in range(4) for j in range(i + 1)} - {(3, 3)}),
    "bwt_plus": (lambda R: m.bwt_plus(R), {(i, j) for i in range(4) for j in range(i + 1)} - {(3, 3)}),
    "fwt_diaz": (lambda R: m.fwt_diaz(R), {(i, j) for i in range(4) for j in range(i + 1, 4)}),
    "transfer": (lambda R: m.transfer(R), {(i, j) for i in range(4) for j in range(i + 1, 4)}),
    "average": (lambda R: m.average(R), {(i, j) for i in range(4) for j in range(4)}),
    "last": (lambda R: m.last(R), {(3, j) for j in range(4)}),
    "intransigence": (lambda R: m.intransigence(R, np.ones(4)), {(i, i) for i in range(4)}),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_cell_makes_exactly_the_metrics_that_need_it_undefined(name):
    function, needed = NEEDS[name]
    full = np.random.default_rng(0).random((4, 4))
    reference = function(full)
    for i in range(4):
        for j in range(4):
            holed = full.copy()
            holed[i, j] = np.nan
            if (i, j) in needed:
                with pytest.raises(m.Undefined, match=rf"R\[{i},{j}\]"):
                    function(holed)
            else:
                assert function(holed) == reference


@pytest.mark.parametrize(
    "name", ["bwt_gem", "fwt_gem", "forgetting_chaudhry", "bwt_diaz", "rem", "fwt_diaz", "transfer"]
)
def test_one_experience_has_no_transfer_and_no_forgetting(name):
    arguments = (np.array([[0.5]]), np.zeros(1)) if name == "fwt_gem" else (np.array([[0.5]]),)
    with pytest.raises(m.Undefined, match="two experiences"):
        getattr(m, name)(*arguments)


def test_what_only_other_runs_or_denser_evaluation_can_give_says_so():
    with pytest.raises(m.Undefined, match="jointly"):
        m.intransigence(R, None)
    with pytest.raises(m.Undefined, match="joint reference"):
        m.intransigence(R, np.array([0.9, np.nan, 0.8]))
    with pytest.raises(m.Undefined, match=r"every n steps.*experience 2"):
        m.min_acc(R, [(1, np.zeros(3))])
    with pytest.raises(m.Undefined, match="freshly initialised"):
        m.fwt_gem(R, np.full(3, np.nan))
    with pytest.raises(m.Undefined, match="shares classes"):
        m.recency_bias([np.zeros(2), np.zeros(2)], [(0, 1), (0, 1)])


matrices = st.integers(2, 6).flatmap(lambda T: arrays(np.float64, (T, T), elements=st.floats(0, 1, width=32)))
quick = settings(max_examples=60, deadline=None)


@quick
@given(matrices)
def test_relations_between_metrics(R):
    close = pytest.approx
    T = len(R)
    assert m.forgetting_first_minus_last(R) == -m.bwt_gem(R)
    assert m.acc_micro(R, np.full(T, 7.0)) == close(m.acc_macro(R))
    assert m.avg_incremental_acc(R, np.full(T, 7.0)) == close(m.avg_incremental_acc_macro(R))
    assert m.last(R) == m.acc_macro(R)
    assert m.forgetting_chaudhry(R) >= m.forgetting_first_minus_last(R) - 1e-12
    assert m.rem(R) == close(1 + min(m.bwt_diaz(R), 0))
    assert m.bwt_plus(R) == max(m.bwt_diaz(R), 0)
    assert m.fwt_gem(R, np.zeros(T)) == close(np.diag(R, 1).mean())
    lower, upper = np.tril_indices(T), np.triu_indices(T, 1)
    whole = m.acc_diaz(R) * len(lower[0]) + m.fwt_diaz(R) * len(upper[0])
    assert whole == close(m.average(R) * T * T)


@quick
@given(matrices, st.floats(-0.5, 0.5))
def test_a_shift_of_all_scores_moves_means_and_leaves_differences(R, shift):
    for name in (
        "acc_macro",
        "avg_incremental_acc_macro",
        "learning_accuracy",
        "acc_diaz",
        "fwt_diaz",
        "average",
        "transfer",
    ):
        assert getattr(m, name)(R + shift) == pytest.approx(getattr(m, name)(R) + shift, abs=1e-9)
    for name in ("bwt_gem", "forgetting_chaudhry", "forgetting_first_minus_last", "bwt_diaz"):
        assert getattr(m, name)(R + shift) == pytest.approx(getattr(m, name)(R), abs=1e-9)


@quick
@given(st.integers(2, 6), st.floats(0, 1))
def test_a_model_that_never_changes_neither_forgets_nor_transfers(T, level):
    R = np.full((T, T), level)
    assert m.bwt_gem(R) == m.forgetting_chaudhry(R) == m.bwt_diaz(R) == m.fwt_gem(R, R[0]) == 0
    assert m.rem(R) == 1
    assert m.min_acc(R, [(i, R[0]) for i in range(1, T)]) == pytest.approx(level)
    assert m.wc_acc(R, [(i, R[0]) for i in range(1, T)]) == pytest.approx(level)
