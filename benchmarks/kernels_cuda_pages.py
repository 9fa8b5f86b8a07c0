"""What pages show of the fused addition on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from benchmarks.harness.interval import Ratio, ratio
from benchmarks.harness.plot import Curve, Plot
from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import Table
from benchmarks.harness.target import Target, cell, tally

_COPY, _OURS, _USUAL = "copy", "fused_add", "bf16 + bf16"
_TORCH = ("torch eager", "torch.compile")
_SHOWN, _PEERS_AT = (1, 16, 64, 256, 2048), 256
#: Of the copy's speed, from so many MiB of weights on: below, launching counts.
LEAST, LEAST_MEBIBYTES = 0.90, 64
#: What the compiler made of a variant → its form.
_COMPILED = {"registers": "{:.0f}", "spills": "{:.0f}", "occupancy": "{:.0%}"}
_Places = dict[tuple[str, int, str], Row]


def _placed(rows: Sequence[Row]) -> _Places:
    """By variant, size and provider."""
    found = {}
    for row in rows:
        match = re.fullmatch(r"(\d+) MiB, (.*)", row.shape)
        if match and row.metric == "time":
            found[match[2], int(match[1]), row.provider] = row
    return found


def _share(places: _Places, variant: str, size: int, who: str) -> Ratio | None:
    """The copy's time by theirs: 1 is as fast as a copy."""
    one, copy = places.get((variant, size, who)), places.get((variant, size, _COPY))
    return ratio(copy, one) if one and copy else None


def targets(rows: Sequence[Row]) -> Iterator[tuple[str, Target]]:
    """Each variant of which something is promised, with that; its slowest size decides."""
    places = _placed(rows)
    for variant in dict.fromkeys(variant for variant, _, _ in places):
        shares = {
            size: share.value
            for of, size, who in places
            if (of, who) == (variant, _OURS)
            and size >= LEAST_MEBIBYTES
            and (share := _share(places, variant, size, _OURS))
        }
        if shares:
            size = min(shares, key=lambda size: shares[size])
            found = f"{shares[size]:.1%} of a copy's speed at {size} MiB"
            yield variant, Target(f"≥ {LEAST:.0%}", shares[size] >= LEAST, found)


def bounds(rows: list[Row]) -> Iterator[str]:
    """What is promised of the addition on a GPU and was missed."""
    for variant, target in targets(rows):
        if target.kept is False:
            yield f"{variant}: {target.missed}"


def _sizes(results: Results) -> Table:
    rows = [row for row in results.published("kernels-cuda") if row.metric == "time"]
    places, promised = _placed(rows), dict(targets(rows))
    lines = []
    for variant in dict.fromkeys(variant for variant, _, _ in places):
        line = [variant]
        for size in _SHOWN:
            share = _share(places, variant, size, _OURS)
            line.append(f"{share.value:.0%}" if share else "")
        for who in _TORCH:
            theirs, mine = (places.get((variant, _PEERS_AT, w)) for w in (who, _OURS))
            line.append(str(ratio(theirs, mine)) if theirs and mine else "")
        lines.append([*line, cell([promised[variant]] if variant in promised else [])])
    head = ["weights + delta", *(f"{size} MiB" for size in _SHOWN)]
    head += [f"faster than {who}, {_PEERS_AT} MiB" for who in _TORCH]
    head += [f"target, from {LEAST_MEBIBYTES} MiB"]
    note = "Shares of the speed of a measured copy of as many bytes."
    return Table(head, lines, rows, f"{note} {tally(list(promised.values()))}".strip())


def _registers(results: Results) -> Table:
    rows: list[Row] = []
    for name in ("kernels", "kernels-cuda"):
        try:
            rows += [row for row in results.published(name) if row.op == "compiled"]
        except NotMeasured:
            continue
    if not rows:
        command = "python -m benchmarks run kernels"
        raise NotMeasured("registers", expected=f"rows of '{command}'", got="none", fix="Run it.")
    columns = list(dict.fromkeys((row.provider, row.metric) for row in rows))
    found = {(row.shape, row.provider, row.metric): row.p50 for row in rows}
    lines = [
        [shape, *(_COMPILED[metric].format(found[shape, gpu, metric]) for gpu, metric in columns)]
        for shape in dict.fromkeys(row.shape for row in rows)
    ]
    head = ["weights + delta", *map(", ".join, columns)]
    note = "Registers a thread, bytes spilled, warps at once of the most that there can be."
    return Table(head, lines, rows, note)


def _plot(results: Results) -> Plot:
    rows = [r for r in results.published("kernels-cuda") if r.shape.endswith(f"MiB, {_USUAL}")]
    places = _placed(rows)
    curves = []
    for who in dict.fromkeys(who for _, _, who in places if who != _COPY):
        points = [
            (float(size), share.value)
            for variant, size, provider in sorted(places)
            if provider == who and (share := _share(places, variant, size, who))
        ]
        curves.append(Curve(who, points))
    return Plot(f"{_USUAL}, share of a copy's speed", "MiB of weights", "share", curves, rows)


TABLES = {"kernels-cuda": _sizes, "kernels-registers": _registers}
PLOTS = {"kernels-cuda": _plot}
