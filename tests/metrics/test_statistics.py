"""Means over seeds against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmoe.metrics import paired_difference, summarise


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_interval_equals_scipys(values):
    s = summarise(values)
    assert s.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert s.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if s.std is not None and s.std > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (s.low, s.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
        assert s.half == pytest.approx((high - low) / 2, rel=1e-6, abs=1e-9)


def test_a_known_interval():
    s = summarise([1.0, 2.0, 3.0])
    assert (s.mean, s.std) == (2.0, 1.0)
    assert s.half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)


def test_one_value_has_no_spread_and_none_is_an_error():
    s = summarise([0.5])
    assert (s.n, s.mean, s.std, s.low, s.high, s.half) == (1, 0.5, None, None, None, None)
    with pytest.raises(ValueError):
        summarise([])


def test_paired_difference_uses_the_common_seeds_only():
    s = paired_difference({0: 0.9, 1: 0.8, 7: 0.1}, {0: 0.5, 1: 0.3, 2: 0.0})
    assert s.n == 2
    assert s.mean == pytest.approx(0.45)
    ours, base = [0.9, 0.8, 0.85], [0.5, 0.3, 0.6]
    s = paired_difference(dict(enumerate(ours)), dict(enumerate(base)))
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert (s.low, s.high) == pytest.approx((low, high))
    with pytest.raises(ValueError):
        paired_difference({0: 1.0}, {1: 1.0})
