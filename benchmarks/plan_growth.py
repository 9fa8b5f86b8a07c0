"""What a plan of a larger model costs, from the measured times of single shapes.

A shape that was measured counts with its time; another with that of the measured one that is
nearest in work, times the ratio of their operations. The operations are the textbook's (Golub
and Van Loan): 9 s³ for eigenvectors, 6 s²l + 20 s³ for a full SVD, of a matrix with a short side s
and a long one l.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.architectures import GROWING, Shape
from benchmarks.harness import Row, row

_GAMMA = 0.5
#: Of what real fine-tunes have, and the dearer: see `plan_cases.delta`.
SPECTRUM = "decaying"


def operations(shape: Shape, provider: str) -> float:
    """Of one pair of deltas, up to a factor that all shapes share."""
    short, long = sorted(map(float, shape))
    kept = _GAMMA * short
    if provider not in ("cold", "cached"):
        svd = 6 * short**2 * long + 20 * short**3
        joined = 2 * kept
        return 2 * svd + 2 * joined**2 * (short + long) + 4 * joined**3
    factored = 9 / 8 * short**2 * long + 9 * short**3 + 2 * kept * short * long
    crossed = 2 * kept**2 * (short + long) + 4 * kept**3
    return (2 if provider == "cold" else 1) * factored + crossed


def pair_seconds(shape: Shape, provider: str, measured: Mapping[Shape, float]) -> float:
    """Of one pair: measured, or modelled from the measured shape that is nearest in work."""
    ordered = min(shape), max(shape)
    known = {(min(s), max(s)): seconds for s, seconds in measured.items()}
    if ordered in known:
        return known[ordered]
    work = operations(shape, provider)
    nearest = min(known, key=lambda s: abs(math.log(work / operations(s, provider))))
    return known[nearest] * work / operations(nearest, provider)


def model_seconds(shapes: Counter[Shape], provider: str, measured: Mapping[Shape, float]) -> float:
    """Of all matrices of a model."""
    return sum(count * pair_seconds(s, provider, measured) for s, count in shapes.items())


def times(rows: Sequence[Row], provider: str) -> dict[Shape, float]:
    """The measured seconds of a provider, by shape."""
    found = {}
    for one in rows:
        match = re.fullmatch(rf"(\d+)x(\d+) {SPECTRUM}", one.shape)
        if match and one.provider == provider:
            found[int(match[1]), int(match[2])] = one.p50
    return found


def growth(rows: Sequence[Row]) -> Iterator[Row]:
    """Modelled rows, one for each model, scope and provider."""
    for provider in dict.fromkeys(one.provider for one in rows):
        if measured := times(rows, provider):
            for model in GROWING:
                scopes = {"attention": model.attention()}
                scopes["attention+ffn"] = model.attention() + model.feed_forward()
                for scope, shapes in scopes.items():
                    seconds = model_seconds(shapes, provider, measured)
                    yield row(
                        "plan_model", provider, f"{model.name}, {scope}", "fp32", [seconds],
                        basis="modelled",
                    )  # fmt: skip
