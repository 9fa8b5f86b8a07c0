"""What is promised of planning, of the medians: for each shape that has a bound, every spectrum."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks.harness.rows import Row
from benchmarks.harness.target import Target

PEER = "authors' algorithm"
#: Long side by short side → how many times faster than the peer.
LEAST = {"cold": {1.0: 1.7, 4.0: 6.0}, "cached": {1.0: 3.5, 4.0: 12.0}}


def targets(rows: Sequence[Row]) -> Iterator[tuple[Row, Target]]:
    """Each figure of ours of which something is promised, with that."""
    peers = {row.what: row for row in rows if row.provider == PEER}
    for row in rows:
        least = LEAST.get(row.provider, {}).get(_aspect(row.shape))
        if least is not None and row.what in peers:
            faster = peers[row.what].p50 / row.p50
            yield row, Target(f"≥ {least:g}×", faster >= least, f"{faster:.4g}× as fast")


def bounds(rows: list[Row]) -> Iterator[str]:
    """What is promised of planning and was missed."""
    for row, target in targets(rows):
        if target.kept is False:
            yield f"{row.provider}, {row.shape}: {target.missed}"


def _aspect(shape: str) -> float:
    """Of a pair of matrices; 0 of anything else."""
    match = re.fullmatch(r"(\d+)x(\d+) \w+", shape)
    if match is None:
        return 0.0
    short, long = sorted(map(int, match.groups()))
    return long / short
