"""What pages show of planning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.architectures import GROWING
from benchmarks.harness.interval import ratio
from benchmarks.harness.plot import Curve, Plot
from benchmarks.harness.results import Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Table
from benchmarks.harness.target import cell, tally
from benchmarks.harness.units import shown
from benchmarks.plan_bounds import PEER, targets
from benchmarks.plan_growth import Pace, growth

_WAYS = (PEER, "cold", "cached")


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.shape, {})[row.provider] = row
    for shape, ways in found.items():
        peer = ways[_WAYS[0]]
        line = [shape, shown(peer.p50, "s")]
        for name in _WAYS[1:]:
            line += [shown(ways[name].p50, "s"), str(ratio(peer, ways[name]))]
        yield line


def _pairs_and_models(results: Results) -> list[Row]:
    return [row for row in results.published("plan") if row.op == "plan"]


def _measured(results: Results) -> Table:
    rows = _pairs_and_models(results)
    promised = list(targets(rows))
    lines = [
        [*line, cell(target for row, target in promised if row.shape == line[0])]
        for line in _lines(rows)
    ]
    head = ["a pair of matrices, or a model", *_WAYS[:2], "faster by", _WAYS[2], "faster by"]
    return Table([*head, "target"], lines, rows, tally([target for _, target in promised]))


def _growth(results: Results) -> Table:
    rows = _pairs_and_models(results)
    head = ["model, scope", *_WAYS[:2], "faster by", _WAYS[2], "faster by"]
    note = "Modelled from the measured times of single shapes"
    cached = Pace.of(rows, "cached")
    if cached.model:
        note += (
            ", and of what the whole model above took beyond its own shapes, which is the same "
            f"work cold and cached: {shown(cached.besides, 's')} of "
            f"{shown(cached.model_seconds, 's')}"
        )
    return Table(head, _lines(list(growth(rows))), rows, f"{note}.")


def _plot(results: Results) -> Plot:
    rows = _pairs_and_models(results)
    seconds = {(row.provider, row.shape): row.p50 for row in growth(rows)}
    sizes = {model.parameters / 1e9: model.name for model in GROWING}
    curves = [
        Curve(
            f"{way}, {scope}",
            [(size, seconds[way, f"{name}, {scope}"]) for size, name in sizes.items()],
            modelled=True,
        )
        for scope in ("attention", "attention+ffn")
        for way in _WAYS
    ]
    ticks = {size: f"{size:.2g}B" for size in sizes}
    return Plot(
        "Planning, modelled from measured shapes", "parameters", "seconds", curves, rows, ticks
    )


TABLES = {"plan": _measured, "plan-growth": _growth}
PLOTS = {"plan-growth": _plot}
