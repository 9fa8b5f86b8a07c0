"""Intervals and p-values against other ways to compute them."""

import itertools
import math
from fractions import Fraction

import pytest

from enchtable_vllm.evaluate.statistics import mcnemar, paired_interval, wilson


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [  # by the textbook's formula, to four digits
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 100, 0.0018, 0.0545),
        (13, 100, 0.0776, 0.2098),
    ],
)
def test_wilson(count, of, low, high):
    assert wilson(count, of) == pytest.approx((low, high), abs=6e-5)


def test_wilson_ends_where_its_own_equation_says():
    """|share − p| = z·sqrt(p(1−p)/n) at both ends."""
    for count, of in ((3, 17), (200, 450), (449, 450)):
        for end in wilson(count, of):
            spread = 1.959963984540054 * math.sqrt(end * (1 - end) / of)
            assert abs(count / of - end) == pytest.approx(spread)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_binomial_test():
    for first, second in ((0, 0), (1, 0), (5, 1), (3, 3), (10, 30), (600, 500)):
        n = first + second
        density = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1)]
        exact = sum(p for p in density if p <= density[first])  # R's binom.test
        assert mcnemar(first, second) == pytest.approx(float(exact), rel=1e-12)
        assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_many_pairs_is_no_overflow():
    assert mcnemar(3000, 2000) < 1e-40


def test_paired_interval_of_many_is_the_normal_one():
    low, high = paired_interval(600, 200, 4000)
    difference = (200 - 600) / 4000
    spread = 1.96 * math.sqrt(((600 + 200) / 4000 - difference**2) / 4000)
    assert low == pytest.approx(difference - spread, abs=1e-4)
    assert high == pytest.approx(difference + spread, abs=1e-4)


def test_paired_interval_never_says_that_there_is_no_doubt():
    low, high = paired_interval(0, 0, 50)
    assert low == -high < -0.05
    assert paired_interval(0, 0, 0) == (-1.0, 1.0)
    assert paired_interval(0, 4, 678)[0] < 0  # of which McNemar says p = 0.125


@pytest.mark.parametrize("pairs", [30, 150])
@pytest.mark.parametrize(("first", "second"), [(0.01, 0.01), (0.02, 0.1), (0.3, 0.1), (0.4, 0.5)])
def test_paired_interval_covers_what_it_should(pairs, first, second):
    """Over every outcome that there may be, with its probability: multinomial."""
    covered = 0.0
    for a in range(pairs + 1):
        for b in range(pairs + 1 - a):
            ways = math.comb(pairs, a) * math.comb(pairs - a, b)
            chance = ways * first**a * second**b * (1 - first - second) ** (pairs - a - b)
            low, high = paired_interval(a, b, pairs)
            covered += chance * (low <= second - first <= high)
    assert 0.94 <= covered <= 1.0


def test_paired_interval_and_mcnemar_agree():
    disagree = 0
    for first, second in itertools.product(range(16), repeat=2):
        low, high = paired_interval(first, second, 400)
        disagree += (mcnemar(first, second) < 0.05) != (not low <= 0 <= high)
    assert disagree <= 8  # of 256, at the edge of 5%
