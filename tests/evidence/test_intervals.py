"""Intervals, by hand and as scipy has them."""

import math

import pytest

from evidence.intervals import T_975, interval, ratio


def test_the_quantiles_are_those_of_student_s_t() -> None:
    # scipy.stats.t.ppf(0.975, df) for df of 1 to 10
    scipy = (12.7062047, 4.3026527, 3.1824463, 2.7764451, 2.5705818, 2.4469118, 2.3646243, 2.3060041, 2.2621572,
             2.2281389)  # fmt: skip
    assert pytest.approx(scipy, abs=5e-4) == T_975  # written with three digits


def test_an_interval_of_three_values() -> None:
    found = interval([1.0, 2.0, 6.0])
    # mean 3; deviations -2, -1, 3 have squares of sum 14, so s = sqrt(14 / 2); t of 2 degrees is 4.303
    assert found.mean == pytest.approx(3.0)
    assert found.half == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3))
    # scipy.stats.t.interval(0.95, 2, loc=3, scale=scipy.stats.sem([1, 2, 6])) = (-3.5724, 9.5724)
    assert (found.low, found.high) == pytest.approx((-3.5724, 9.5724), abs=2e-3)


def test_one_value_has_no_interval() -> None:
    found = interval([5.0])
    assert (found.mean, found.half, found.low, found.high) == (5.0, None, 5.0, 5.0)


def test_of_more_than_eleven_values_the_interval_is_a_little_too_wide_and_never_too_narrow() -> None:
    values = [float(i) for i in range(20)]
    exact = 2.0930 * math.sqrt(35.0) / math.sqrt(20)  # t of 19 degrees; the variance of 0 to 19 is 20 * 21 / 12
    assert exact < (interval(values).half or 0) < 1.1 * exact


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # Each value is 0.9 of its pair, so the ratio is exact, however far the pairs lie apart.
    mean, low, high = ratio([9.0, 90.0, 900.0], [10.0, 100.0, 1000.0])
    assert (mean, low, high) == pytest.approx((0.9, 0.9, 0.9))


def test_the_mean_and_interval_of_a_ratio_are_of_its_logarithm() -> None:
    mean, low, high = ratio([1.0, 4.0], [2.0, 2.0])  # ratios 1/2 and 2: logarithms -ln 2 and ln 2
    half = 12.706 * math.log(2) * math.sqrt(2) / math.sqrt(2)  # s = ln 2 * sqrt(2)
    assert mean == pytest.approx(1.0)
    assert (low, high) == pytest.approx((math.exp(-half), math.exp(half)))


def test_one_pair_has_a_ratio_without_interval() -> None:
    assert ratio([3.0], [4.0]) == (pytest.approx(0.75), None, None)
