"""What pages show of loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Table
from benchmarks.harness.target import Target, cell, tally
from benchmarks.harness.units import shown
from benchmarks.load_bounds import targets
from benchmarks.load_worker import AUTO


def _table(rows: Sequence[Row], what: str, whole: Sequence[Row] = ()) -> Table:
    """Times beside peaks, the times' ratio to plain vLLM's, and what is promised of both.

    Args:
        rows: Of what is shown.
        what: Its name.
        whole: Of what it is a part of, if that is shown too.
    """
    plain = {row.what: row for row in (*rows, *whole) if row.provider == AUTO}
    wholes = {(row.provider, row.shape): row for row in whole}
    peaks = {(row.provider, row.shape): row for row in rows if row.metric != "time"}
    shapes = list(dict.fromkeys(row.shape for row in rows))
    timed = sorted(  # whoever was first in turn, plain vLLM comes first here
        (row for row in rows if row.metric == "time"),
        key=lambda row: (shapes.index(row.shape), row.provider != AUTO),
    )
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
            *_beside(wholes.get((row.provider, row.shape)), plain),
            shown(peaks[row.provider, row.shape].p50, "B"),
            cell(promised.get((row.provider, row.shape), ())),
        ]
        for row in timed
    ]
    note = tally([target for _, target in found])
    beside = ["whole load", "÷ auto"] if whole else []
    head = ["model", "by", what, "÷ auto", *beside, "peak", "target"]
    return Table(head, lines, [*rows, *whole], note)


def _beside(whole: Row | None, plain: Mapping[tuple[str, ...], Row]) -> list[str]:
    return [] if whole is None else [shown(whole.p50, "s"), str(ratio(whole, plain[whole.what]))]


def _weights(results: Results) -> Table:
    published = results.published("load")
    rows = [row for row in published if row.op == "load_weights"]
    return _table(rows, "weights loaded in", [row for row in published if row.op == "load_model"])


def _ready(results: Results) -> Table:
    rows = [row for row in results.published("load") if row.op == "api_ready"]
    return _table(rows, "API ready after")


TABLES = {"load": _weights, "load-ready": _ready}
