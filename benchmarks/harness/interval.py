"""How sure a ratio is: a bootstrap over what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.rows import Row

RESAMPLES = 10_000
COVERAGE = 0.95
#: Of fewer values a bootstrap says nothing.
LEAST_VALUES = 3


@dataclass(frozen=True)
class Ratio:
    """Of two medians, with its 95% interval; without one where there are too few values."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """For people, and tables."""
        if self.low is None or self.high is None:
            return f"{_short(self.value)}×"
        return f"{_short(self.value)}× ({_short(self.low)}–{_short(self.high)})"

    def inverse(self) -> Ratio:
        """The other way round."""
        if self.low is None or self.high is None:
            return Ratio(1 / self.value)
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours / theirs: percentile bootstrap, each side drawn by itself, the same draws each time."""
    value = float(np.median(ours) / np.median(theirs))
    if min(len(ours), len(theirs)) < LEAST_VALUES:
        return Ratio(value)
    generator = np.random.default_rng(0)
    above, below = (
        np.median(generator.choice(np.asarray(values), (RESAMPLES, len(values))), axis=1)
        for values in (ours, theirs)
    )
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return Ratio(value, float(low), float(high))


def ratio(ours: Row, theirs: Row) -> Ratio:
    """Of two rows; without an interval where their values were not kept, or none were measured."""
    if ours.basis == theirs.basis == "measured" and ours.samples and theirs.samples:
        return ratio_of_medians(ours.samples, theirs.samples)
    return Ratio(ours.p50 / theirs.p50 if theirs.p50 else math.nan)


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"
