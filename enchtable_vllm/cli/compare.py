"""``enchtable compare``: models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.cli.options import JsonOption
from enchtable_vllm.cli.output import out, print_json, say, warn
from enchtable_vllm.errors import printable
from enchtable_vllm.evaluate.compare import KINDS, Comparison, Difference
from enchtable_vllm.evaluate.compare import compare as side_by_side
from enchtable_vllm.evaluate.compare_page import about, compare_page, doubtful, sign
from enchtable_vllm.evaluate.files import write_whole
from enchtable_vllm.evaluate.report import Kind, Rate, read_report


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(help="Folders that 'enchtable eval' wrote; the first is held against."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write a page: a file of HTML."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put evaluated models side by side, with paired significance.

    Differences are from the first report, over the prompts that both were asked, with McNemar's
    exact p. Nothing is asked of any server.
    """
    named = zip(_names(reports), reports, strict=True)
    comparison = side_by_side([(name, read_report(path)) for name, path in named])
    if output is not None:
        write_whole(output, compare_page(comparison))
    for warning in comparison.warnings:
        warn(warning)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
        return
    _print(comparison)
    if output is not None:
        say(f"page written to {output}")


def _names(paths: list[Path]) -> list[str]:
    """The ends of the folders' paths that tell them apart."""
    parts = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = [str(Path(*own[-length:])) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _print(comparison: Comparison) -> None:
    kinds = [kind for kind in KINDS if any(kind in row.rates for row in comparison.rows)]
    garak = any(row.garak for row in comparison.rows)
    table = Table(box=box.SIMPLE, show_lines=True)
    table.add_column("model", overflow="fold")
    for kind in kinds:
        table.add_column(KINDS[kind][0])
    if garak:
        table.add_column("garak")
    for row in comparison.rows:
        cells = [
            f"[bold]{escape(printable(row.label))}[/]\n[dim]{escape(printable(about(row)))}[/]"
        ]
        for kind in kinds:
            difference = row.differences.get(kind)
            words = rate_words(row.rates.get(kind))
            if open_ := doubtful(row.doubts.get(kind)):
                words += f"\n[dim]{open_}[/]"
            cells.append(words + (f"\n{_words(difference, kind)}" if difference else ""))
        table.add_row(*cells, *([rate_words(row.garak)] if garak else []))
    out.print(table)


def rate_words(rate: Rate | None) -> str:
    """A share, its interval and its counts, in two lines."""
    if rate is None or rate.share is None:
        return "–"
    interval = f"{rate.low:.1%} to {rate.high:.1%}, {rate.count}/{rate.of}"
    return f"{rate.share:.1%}\n[dim]{interval}[/]"


def _words(difference: Difference, kind: Kind) -> str:
    if difference.difference is None:
        return "no pairs"
    colour = {"better": "green", "worse": "red"}.get(verdict := sign(difference, kind), "dim")
    return (
        f"[{colour}]{difference.difference:+.1%}, p = {difference.p:.2g}[/]\n"
        f"[dim]{verdict}, {difference.pairs} pairs[/]"
    )
