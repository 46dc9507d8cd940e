"""Medians, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "median_of"]


class Interval(NamedTuple):
    """A median and its bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Three digits."""
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def signed(self) -> str:
        """Three digits and the sign."""
        return f"{self.median:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def median_of(values: Sequence[float]) -> Interval:
    """The median, and where 95% of the medians of resampled values are (percentile bootstrap).

    With five values or fewer that is from the least to the greatest: the range of the seeds, no more.
    """
    x = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(x, (10_000, len(x)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(np.median(x)), float(low), float(high))
