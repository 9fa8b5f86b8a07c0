"""What is promised of loading, of the medians."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks import models
from benchmarks.architectures import Architecture
from benchmarks.harness.interval import Ratio, ratio
from benchmarks.harness.rows import Row
from benchmarks.harness.target import Target
from benchmarks.harness.units import shown
from benchmarks.load_worker import AUTO

#: Of plain vLLM's time, page cache warm; a small model has less to hide reading and hashing behind.
MOST_WARM, MOST_WARM_SMALL = 1.10, 1.15
MOST_READY = 1.02
TENSORS_AHEAD = 2
_BF16 = 2


def targets(rows: Sequence[Row]) -> Iterator[tuple[Row, Target]]:
    """Each figure of ours of which something is promised, with that.

    A peak, of anonymous memory while weights load or of a whole rank, may pass plain vLLM's by two
    of the largest stored tensor: as much as the read-ahead may hold, and what is being merged. Rows
    do not have its size; it is that of the architecture's largest matrix.
    """
    plain = {row.what: row for row in rows if row.provider == AUTO}
    for row in rows:
        if not row.provider.startswith("enchtable") or row.what not in plain:
            continue
        auto = plain[row.what].p50
        if row.metric == "time" and row.op == "api_ready":
            starts = ratio(row, plain[row.what])
            yield row, Target(f"≤ {MOST_READY:g}×", _ready_in_time(starts), f"{starts} auto")
        elif (most := _most(row)) is not None:
            share = row.p50 / auto
            yield row, Target(f"≤ {most:g}×", share <= most, f"{share:.4g}× auto")
        elif row.metric in ("peak", "peak of a rank"):
            bound = auto + TENSORS_AHEAD * largest_bytes(models.SHAPES[_which(row)])
            promised = f"≤ {shown(bound, 'B')}"
            yield row, Target(promised, row.p50 <= bound, shown(row.p50, "B"))


def bounds(rows: list[Row]) -> Iterator[str]:
    """What is promised of loading and was missed."""
    for row, target in targets(rows):
        if target.kept is False:
            yield f"{row.op}, {row.metric}, {row.provider}, {row.shape}: {target.missed}"


def largest_bytes(model: Architecture) -> int:
    """Of its largest stored tensor, in bf16."""
    matrices = [*model.attention(), *model.feed_forward(), (model.vocabulary, model.hidden)]
    return _BF16 * max(rows * columns for rows, columns in matrices)


def _ready_in_time(share: Ratio) -> bool | None:
    """Two starts of one server differ by more than is promised: only an interval decides."""
    if share.low is None or share.high is None or share.low <= MOST_READY < share.high:
        return None
    return share.high <= MOST_READY


def _most(row: Row) -> float | None:
    """Of plain vLLM's time; None where nothing is promised of it."""
    if row.metric != "time":
        return None
    if row.op == "load_weights" and re.search(r", warm\b", row.shape):
        return MOST_WARM_SMALL if _which(row) == "small" else MOST_WARM
    return None


def _which(row: Row) -> str:
    return next(which for which, name in models.NAMES.items() if row.shape.startswith(name))
