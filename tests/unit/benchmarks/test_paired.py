"""Paired differences, against textbooks: data with known t and p, and intervals by hand with a table of t."""

from __future__ import annotations

import math

import pytest

from benchmarks.paired import difference

#: Hours of sleep gained with one drug and with another, ten patients ("Student", The probable error of a mean, 1908).
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)
SLEEP = tuple(one - other for one, other in zip(FIRST, SECOND, strict=True))


def test_the_sleep_data() -> None:
    """R's ``t.test(extra ~ group, data = sleep, paired = TRUE)``: t = -4.0621, df = 9, p = 0.002833."""
    found = difference(SLEEP)
    assert (found.n, found.below, found.verdict) == (10, 9, "below")
    assert found.mean == pytest.approx(-1.58)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert found.p == pytest.approx(0.002833, abs=5e-7)


@pytest.mark.parametrize(
    ("values", "quantile"),
    [((-0.01, -0.02, -0.06), 4.3027), ((1.0, 2.0, 4.0, -3.0, 0.5), 2.7764), ((3.0, 5.0), 12.7062)],
    ids=["3", "5", "2"],
)
def test_the_interval_by_hand(values: tuple[float, ...], quantile: float) -> None:
    """Mean, plus and minus the table's t at 0.975 with n - 1 degrees, times s / sqrt(n)."""
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    found = difference(values)
    half = quantile * deviation / math.sqrt(n)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-4)
    # An interval that holds 0, and a p above what is left of its confidence, are the same statement.
    assert (found.low < 0 < found.high) == (found.p > 0.05)


def test_p_with_two_degrees_of_freedom() -> None:
    """There the distribution has a closed form: p = 1 - t / sqrt(t^2 + 2); here t = 3 / sqrt(3), p = 0.2254."""
    found = difference((0.0, 3.0, 6.0))
    assert found.p == pytest.approx(1 - math.sqrt(3) / math.sqrt(5), rel=1e-9)
    assert found.verdict == "no difference beyond the spread" and found.shown_p == "0.225"


def test_one_pair_has_no_interval() -> None:
    found = difference([-0.25])
    assert (found.low, found.high, found.p, found.below) == (None, None, None, 1)
    assert (found.shown(), found.shown_p, found.verdict) == ("-0.2500", "", "one pair, no interval")


def test_no_pairs() -> None:
    with pytest.raises(ValueError, match="expected one or more"):
        difference([])


def test_differences_that_are_all_the_same() -> None:
    """As of two runs of one function: no division by a spread of 0."""
    assert difference([0.0, 0.0]).p == 1 and difference([0.0, 0.0]).verdict == "no difference beyond the spread"
    assert difference([2.0, 2.0]).verdict == "above"


def test_shown() -> None:
    """Zero itself is not below, and signs are shown."""
    found = difference((0.0, -1.0, 0.5))
    assert found.shown_below == "1 of 3"
    assert found.shown(2) == "-0.17 (-2.06 to +1.73)"
