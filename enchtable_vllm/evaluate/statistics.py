"""Intervals and significance: exact or closed-form, so that nothing else is needed."""

from __future__ import annotations

import math

#: The 97.5% point of the normal distribution.
_Z = 1.959963984540054


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share.

    Args:
        count: How many.
        of: Of how many; 0 tells nothing, and the interval says so: (0, 1).

    Returns:
        Its ends, in [0, 1].

    Source:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        1927: unlike the textbook's interval it holds near 0% and 100%, where unsafe rates are.
    """
    if of == 0:
        return 0.0, 1.0
    share, z2 = count / of, _Z * _Z
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    spread = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    # At the ends the formula is exact; its arithmetic is not.
    low = 0.0 if count == 0 else max(0.0, centre - spread)
    high = 1.0 if count == of else min(1.0, centre + spread)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of a paired difference between two shares.

    Args:
        only_first: Prompts on which the first model alone did it.
        only_second: Prompts on which the second model alone did it.

    Returns:
        The probability of a split at least as uneven, if each were a fair coin's doing.

    Source:
        Q. McNemar, 1947; exact by the binomial distribution: discordant pairs are often few.
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**discordant))  # of integers of any size; rounded once


def paired_interval(only_first: int, only_second: int, pairs: int) -> tuple[float, float]:
    """The 95% interval of (second's share − first's share), over the same prompts.

    Args:
        only_first: Prompts on which the first model alone did it.
        only_second: Prompts on which the second model alone did it.
        pairs: All prompts that both answered.

    Returns:
        Its ends, in [-1, 1].

    Source:
        D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a difference of
        binomial proportions based on paired data", 2012: one is added to either kind of discordant
        pair. A bootstrap sees no more than the discordant pairs that there are, of which there may
        be none: its interval would be a point.
    """
    if pairs == 0:
        return -1.0, 1.0
    first, second = ((count + 1) / (pairs + 2) for count in (only_first, only_second))
    difference = second - first
    spread = _Z * math.sqrt((first + second - difference**2) / (pairs + 2))
    return max(-1.0, difference - spread), min(1.0, difference + spread)
