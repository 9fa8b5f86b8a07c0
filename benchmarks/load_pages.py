"""What pages show of loading."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Table
from benchmarks.harness.target import Target, cell, tally
from benchmarks.harness.units import shown
from benchmarks.load_bounds import targets
from benchmarks.load_worker import AUTO


def _table(rows: Sequence[Row], what: str) -> Table:
    """Times beside peaks, the times' ratio to plain vLLM's, and what is promised of both."""
    plain = {row.what: row for row in rows if row.provider == AUTO}
    peaks = {(row.provider, row.shape): row for row in rows if row.metric != "time"}
    timed = [row for row in rows if row.metric == "time"]
    found = list(targets(rows))
    promised: dict[tuple[str, str], list[Target]] = {}
    for row, target in found:
        promised.setdefault((row.provider, row.shape), []).append(target)
    lines = [
        [
            row.shape,
            row.provider,
            shown(row.p50, "s"),
            str(ratio(row, plain[row.what])),
            shown(peaks[row.provider, row.shape].p50, "B"),
            cell(promised.get((row.provider, row.shape), ())),
        ]
        for row in timed
    ]
    note = tally([target for _, target in found])
    return Table(["model", "by", what, "÷ auto", "peak", "target"], lines, rows, note)


def _weights(results: Results) -> Table:
    rows = [row for row in results.published("load") if row.op == "load_weights"]
    return _table(rows, "weights loaded in")


def _ready(results: Results) -> Table:
    rows = [row for row in results.published("load") if row.op == "api_ready"]
    return _table(rows, "API ready after")


TABLES = {"load": _weights, "load-ready": _ready}
