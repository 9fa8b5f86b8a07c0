"""What a plan of a larger model costs, from what was measured.

A shape that was measured counts with its time; another with that of the measured one that is
nearest in work, times the ratio of their operations. The operations are the textbook's (Golub
and Van Loan): 9 s³ for eigenvectors, 6 s²l + 20 s³ for a full SVD, of a matrix with a short side s
and a long one l.

A whole command also reads files, digests them and computes the outcome, which grows with bytes and
not with operations: so what the whole model that was measured took beyond its pairs is added, for
each parameter that is read. Ours reads all, whatever the scope, and is charged in full even where
it only digests; the peer reads those that it plans.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.architectures import GROWING, Architecture, Shape, random_of
from benchmarks.harness import Row, row

_GAMMA = 0.5
_OURS = ("cold", "cached")
#: The scope of the whole model that is measured.
WHOLE = "attention+ffn"
#: Of what real fine-tunes have, and the dearer: see `plan_cases.delta`.
SPECTRUM = "decaying"


def operations(shape: Shape, provider: str) -> float:
    """Of one pair of deltas, up to a factor that all shapes share."""
    short, long = sorted(map(float, shape))
    kept = _GAMMA * short
    if provider not in _OURS:
        svd = 6 * short**2 * long + 20 * short**3
        joined = 2 * kept
        return 2 * svd + 2 * joined**2 * (short + long) + 4 * joined**3
    factored = 9 / 8 * short**2 * long + 9 * short**3 + 2 * kept * short * long
    crossed = 2 * kept**2 * (short + long) + 4 * kept**3
    return (2 if provider == "cold" else 1) * factored + crossed


@dataclass(frozen=True)
class Pace:
    """What one provider takes.

    Attributes:
        provider: Whose.
        pairs: Measured seconds of a pair, by shape.
        model: Of the whole model that was measured, if one was.
        model_seconds: Measured.
    """

    provider: str
    pairs: dict[Shape, float]
    model: Architecture | None = None
    model_seconds: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Row], provider: str) -> Pace:
        """From the rows of a run."""
        pairs: dict[Shape, float] = {}
        model, seconds = None, 0.0
        for one in rows:
            if one.provider != provider:
                continue
            if match := re.fullmatch(rf"(\d+)x(\d+) {SPECTRUM}", one.shape):
                pairs[int(match[1]), int(match[2])] = one.p50
            elif match := re.fullmatch(r"model of (\d+) layers, (\d+) wide", one.shape):
                model, seconds = random_of(int(match[1]), int(match[2])), one.p50
        return cls(provider, pairs, model, seconds)

    def pair_seconds(self, shape: Shape) -> float:
        """Of one pair: measured, or modelled from the measured shape that is nearest in work."""
        ordered = min(shape), max(shape)
        known = {(min(s), max(s)): seconds for s, seconds in self.pairs.items()}
        if ordered in known:
            return known[ordered]
        work = operations(shape, self.provider)
        nearest = min(known, key=lambda s: abs(math.log(work / operations(s, self.provider))))
        return known[nearest] * work / operations(nearest, self.provider)

    def all_pairs(self, shapes: Counter[Shape]) -> float:
        """Seconds of the linear algebra alone."""
        return sum(count * self.pair_seconds(shape) for shape, count in shapes.items())

    @property
    def besides(self) -> float:
        """Seconds that the whole model took beyond its pairs; 0 where none was measured.

        The difference of two figures that are near each other: noise may make it negative.
        """
        if self.model is None:
            return 0.0
        return max(0.0, self.model_seconds - self.all_pairs(_whole(self.model)))

    def with_besides_of(self, other: Pace) -> Pace:
        """Its own pairs, and beyond them what the other takes, of whose time that is more."""
        if self.model is None:
            return self
        return replace(self, model_seconds=self.all_pairs(_whole(self.model)) + other.besides)

    @property
    def besides_each(self) -> float:
        """The same for each of its parameters."""
        return self.besides / self.model.parameters if self.model else 0.0

    def longest(self, shapes: Counter[Shape], measured: int, cores: int) -> float:
        """Seconds on so many cores at least: a matrix is the work of one.

        Args:
            shapes: What is planned.
            measured: Cores that worked at once, on a pair each, where pairs were measured.
            cores: Those there are.
        """
        waves = {shape: math.ceil(count / cores) for shape, count in shapes.items()}
        alone = {shape: self.pair_seconds(shape) * measured for shape in shapes}
        spread = self.all_pairs(shapes) * measured / cores
        return max(spread, *(alone[shape] * waves[shape] for shape in shapes))

    def plan_seconds(self, model: Architecture, shapes: Counter[Shape]) -> float:
        """Of a plan of these of a model's matrices."""
        planned = sum(rows * columns * count for (rows, columns), count in shapes.items())
        read = model.parameters if self.provider in _OURS else planned
        return self.all_pairs(shapes) + self.besides_each * read


def growth(rows: Sequence[Row]) -> Iterator[Row]:
    """Modelled rows, one for each model, scope and provider."""
    for provider in dict.fromkeys(one.provider for one in rows):
        pace = Pace.of(rows, provider)
        if provider in _OURS:  # reading and digesting is the same work for both
            pace = pace.with_besides_of(Pace.of(rows, "cached"))
        for model in GROWING if pace.pairs else ():
            for scope, shapes in (("attention", model.attention()), (WHOLE, _whole(model))):
                yield row(
                    "plan_model", provider, f"{model.name}, {scope}", "fp32",
                    [pace.plan_seconds(model, shapes)], basis="modelled",
                )  # fmt: skip


def _whole(model: Architecture) -> Counter[Shape]:
    return model.attention() + model.feed_forward()
