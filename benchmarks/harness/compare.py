"""Ratios with intervals: ours against a peer, or one result against another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness.interval import Ratio, ratio
from benchmarks.harness.rows import Row


@dataclass(frozen=True)
class Comparison:
    """Two rows about the same thing; the ratio is the first's median by the second's."""

    row: Row
    other: Row
    ratio: Ratio

    def record(self) -> dict[str, object]:
        """For JSON."""
        row, other = self.row, self.other
        found = {"op": row.op, "shape": row.shape, "dtype": row.dtype, "metric": row.metric}
        for name, one in (("of", row), ("against", other)):
            found[name] = {"provider": one.provider, "p50": one.p50, "unit": one.unit, "n": one.n,
                           "git_sha": one.git_sha, "utc": one.utc, "basis": one.basis}  # type: ignore[assignment]  # fmt: skip
        return {**found, **dataclasses.asdict(self.ratio)}


def against(rows: Sequence[Row], peer: str) -> Iterator[Comparison]:
    """Each row against the peer's of the same run, where there is one."""
    peers = {(row.utc, *row.what): row for row in rows if row.provider == peer}
    for row in rows:
        other = peers.get((row.utc, *row.what))
        if other is not None and row is not other:
            yield Comparison(row, other, ratio(row, other))


def between(after: Sequence[Row], before: Sequence[Row]) -> Iterator[Comparison]:
    """Each row of one result against its like in another."""
    likes = {(row.provider, *row.what): row for row in before}
    for row in after:
        other = likes.get((row.provider, *row.what))
        if other is not None:
            yield Comparison(row, other, ratio(row, other))
