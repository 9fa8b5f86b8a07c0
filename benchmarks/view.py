"""What the commands show: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness.compare import Comparison, against
from benchmarks.harness.registry import Benchmark
from benchmarks.harness.rows import Row
from benchmarks.harness.units import shown

#: Not narrower than a table of figures, whatever the terminal or pipe.
_out = Console(width=max(Console().width, 140))


def print_json(value: object) -> None:
    """One JSON value on standard output, and nothing else."""
    print(json.dumps(value, indent=2))


def benchmarks(registry: Iterable[Benchmark], *, as_json: bool) -> None:
    """Which there are."""
    if as_json:
        print_json([dataclasses.asdict(benchmark) for benchmark in registry])
        return
    table = Table("benchmark", "needs", "minutes", "what it holds against what", box=None)
    for one in registry:
        table.add_row(one.name, one.device, f"{one.minutes:g}", one.summary)
    _out.print(table)


def options(benchmark: Benchmark, *, as_json: bool) -> None:
    """What one can be told."""
    fields = {
        name: field for name, field in benchmark.options.model_fields.items() if not field.exclude
    }
    sizes = {size: benchmark.preset(size) for size in ("quick", "full")}
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in fields.items()
    }
    if as_json:
        described = {
            name: {"default": defaults[name], "help": field.description}
            for name, field in fields.items()
        }
        print_json({**dataclasses.asdict(benchmark), "options": described, "sizes": sizes})
        return
    _out.print(f"{benchmark.summary}. Needs: {benchmark.device}.", highlight=False)
    table = Table("option", "default", "--quick", "--full", "meaning", box=None)
    for name, field in fields.items():
        values = [defaults[name], *(preset.get(name, "") for preset in sizes.values())]
        table.add_row(name, *map(_short, values), field.description)
    _out.print(table)


def rows(found: Sequence[Row], peer: str | None, *, as_json: bool) -> None:
    """The figures of a run, with their ratios to the peer's."""
    if as_json:
        print_json([dataclasses.asdict(row) for row in found])
        return
    ratios = {id(c.row): str(c.ratio) for c in against(found, peer)} if peer else {}
    table = Table("op", "shape", "dtype", "metric", "provider", "p20", "p50", "p80", "n",
                  f"÷ {peer}" if peer else "", box=None)  # fmt: skip
    for row in found:
        figures = [shown(value, row.unit) for value in (row.p20, row.p50, row.p80)]
        provider = row.provider + (" (modelled)" if row.basis == "modelled" else "")
        table.add_row(row.op, row.shape, row.dtype, row.metric, provider, *figures, str(row.n),
                      ratios.get(id(row), ""))  # fmt: skip
    _out.print(table)


def comparisons(found: Sequence[Comparison], *, as_json: bool) -> None:
    """Ratios, with their intervals."""
    if as_json:
        print_json([comparison.record() for comparison in found])
        return
    table = Table(
        "op", "shape", "metric", "provider", "median", "against", "median", "ratio", box=None
    )
    for one in found:
        table.add_row(
            one.row.op, one.row.shape, one.row.metric, one.row.provider,
            shown(one.row.p50, one.row.unit), _whom(one), shown(one.other.p50, one.other.unit),
            str(one.ratio),
        )  # fmt: skip
    _out.print(table)


def _whom(comparison: Comparison) -> str:
    other = comparison.other
    if other.provider != comparison.row.provider:
        return other.provider
    return f"{other.git_sha or 'no commit'}, {other.utc}"


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
