"""Intervals and p-values against other ways to compute them."""

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


def test_paired_interval_is_close_to_the_normal_one():
    low, high = paired_interval(60, 20, 400)
    difference = (20 - 60) / 400
    spread = 1.96 * math.sqrt(((60 + 20) / 400 - difference**2) / 400)
    assert low == pytest.approx(difference - spread, abs=0.006)
    assert high == pytest.approx(difference + spread, abs=0.006)
    assert paired_interval(60, 20, 400) == (low, high)  # the same seed, the same interval


def test_paired_interval_without_differences_is_a_point():
    assert paired_interval(0, 0, 50) == (0.0, 0.0)
    assert paired_interval(0, 0, 0) == (-1.0, 1.0)
