"""Differences of pairs, such as losses of two runs of one seed: their mean, its interval, and how sure its sign is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: Of the interval.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of ``n`` differences; ``below`` of them are less than 0.

    ``low`` and ``high`` bound the mean with :data:`CONFIDENCE`, and ``p`` is of the paired t test, two-sided, which
    takes differences as normally distributed.  ``None`` of one difference alone.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    below: int

    @property
    def verdict(self) -> str:
        """What the interval says of the sign."""
        if self.low is None or self.high is None:
            return "one pair, no interval"
        if self.high < 0:
            return "below"
        return "above" if self.low > 0 else "no difference beyond the spread"

    def shown(self, digits: int = 4) -> str:
        """``-0.0123 (-0.0200 to -0.0046)``; of one pair the mean alone."""
        mean = f"{self.mean:+.{digits}f}"
        return mean if self.low is None else f"{mean} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    @property
    def shown_p(self) -> str:
        """``0.012``, or ``< 0.001``; nothing of one pair."""
        if self.p is None:
            return ""
        return "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"

    @property
    def shown_below(self) -> str:
        """``2 of 3``."""
        return f"{self.below} of {self.n}"

    @property
    def cells(self) -> tuple[str, str, str]:
        """Of a table: the mean with its interval, p, and how many are below 0."""
        return self.shown(), self.shown_p, self.shown_below


def difference(values: Sequence[float]) -> Difference:
    """Sum up ``values``, one a pair.  Raises :class:`ValueError` of none."""
    if not values:
        raise ValueError("no pairs: expected one or more")
    mean = statistics.fmean(values)
    below = sum(value < 0 for value in values)
    if len(values) == 1:
        return Difference(1, mean, None, None, None, below)
    if len(set(values)) == 1:
        # Without a spread there is no distribution to take an interval from.
        return Difference(len(values), mean, mean, mean, 1.0 if mean == 0 else 0.0, below)
    from scipy import stats

    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(len(values), mean, float(interval.low), float(interval.high), float(test.pvalue), below)
