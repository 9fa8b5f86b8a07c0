"""How sure a ratio is where both sides took turns.

What a busy machine does to one turn it mostly does to the next, so the ratio within a pair of
turns is steadier than either time. Turns are in blocks, one for each start of the servers: where
a process happens to lie in memory makes it a little faster or slower for as long as it lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.interval import COVERAGE, RESAMPLES, Ratio

#: So much of the ratios is left out at each end: a turn that something else interrupted.
_TRIMMED = 0.25
#: Of fewer pairs nothing can be said.
LEAST_PAIRS = 6

Verdict = Literal["holds", "fails", "undecided"]


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], blocks: int = 1, *, least_blocks: int = 1
) -> Ratio:
    """Ours / theirs: the trimmed geometric mean of the ratios within pairs.

    Args:
        ours: In the order of the turns.
        theirs: The turns beside them.
        blocks: So many stretches of equal length, one after the other.
        least_blocks: Of fewer there is no interval: between two servers, what their starts differ
            by is more than what pairs do.

    Returns:
        With its 95% interval: a percentile bootstrap that draws blocks, and in each its pairs;
        of few blocks it is too narrow, as drawing few always is: of five it holds the ratio nine
        times in ten, of two seven. Without one where either are too few.
    """
    ratios = np.log(np.asarray(ours) / np.asarray(theirs)).reshape(blocks, -1)
    value = float(np.exp(_middle(ratios.reshape(-1))))
    if ratios.size < LEAST_PAIRS or blocks < least_blocks:
        return Ratio(value)
    generator = np.random.default_rng(0)
    drawn = generator.integers(blocks, size=(RESAMPLES, blocks, 1))
    pairs = generator.integers(ratios.shape[1], size=(RESAMPLES, *ratios.shape))
    means = np.exp(_middle(ratios[drawn, pairs].reshape(RESAMPLES, -1)))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Ratio(value, float(low), float(high))


def verdict(ratio: Ratio, low: float, high: float) -> Verdict:
    """Of the claim that a ratio lies between two values.

    Returns:
        ``holds`` where its whole interval does, ``fails`` where its whole interval is outside.
    """
    if ratio.low is None or ratio.high is None:
        return "undecided"
    if low <= ratio.low and ratio.high <= high:
        return "holds"
    return "fails" if ratio.high < low or ratio.low > high else "undecided"


def _middle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ordered = np.sort(values, axis=-1)
    cut = int(_TRIMMED * ordered.shape[-1])
    middle: NDArray[np.float64] = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return middle
