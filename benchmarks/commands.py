"""The command line: ``python -m benchmarks list|verify|run|compare|tables|plot``.

Exit codes: 0 done, or nothing to do on this machine, which it says; 1 not verified, or a page out
of date; 2 wrong usage; 3 measured, and a target missed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import view
from benchmarks.harness import plot, tables
from benchmarks.harness.compare import against, between
from benchmarks.harness.options import Size
from benchmarks.harness.registry import REGISTRY, Benchmark, Device, find
from benchmarks.harness.results import Results, chosen
from benchmarks.runs import Wish, run_all
from enchtable_vllm.cli.output import errors, out
from enchtable_vllm.errors import ConfigError, EnchTableError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure this project: first that it is right, then how fast. Rows go to "
    "benchmarks/results, and from there into the pages.",
)

Names = Annotated[list[str] | None, typer.Argument(help="Benchmarks; all, if none is named.")]
Needs = Annotated[Device | None, typer.Option("--device", help="Only those that need it.")]
Quick = Annotated[bool, typer.Option("--quick", help="A check that it works: nothing is written.")]
Full = Annotated[bool, typer.Option("--full", help="What takes longer, and covers more.")]
Assigned = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="name=value, of one benchmark: 'list NAME' has them."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output.")]
Check = Annotated[bool, typer.Option("--check", help="Write nothing: exit 1 if one is stale.")]


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="One, with its options.")] = None,
    as_json: Json = False,
) -> None:
    """Say what each benchmark holds against what, what it needs and takes."""
    if name is None:
        view.benchmarks(REGISTRY, as_json=as_json)
    else:
        view.options(find(name), as_json=as_json)


@app.command()
def verify(
    names: Names = None,
    device: Needs = None,
    quick: Quick = False,
    full: Full = False,
    option: Assigned = None,
) -> None:
    """Prove that what is measured is right, and measure nothing."""
    wish = Wish(_size(quick, full), tuple(option or ()), measured=False)
    raise typer.Exit(run_all(_wanted(names, device), wish))


@app.command()
def run(
    names: Names = None,
    device: Needs = None,
    quick: Quick = False,
    full: Full = False,
    option: Assigned = None,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="Append rows to benchmarks/results.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Verify, then measure: what is not right has no figures, and exit code 1.

    A target that is missed is exit code 3; its figures are kept.
    """
    wish = Wish(_size(quick, full), tuple(option or ()), written=write, as_json=as_json)
    raise typer.Exit(run_all(_wanted(names, device), wish))


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="A benchmark.")],
    before: Annotated[
        str | None, typer.Option(help="A commit, a time or a file of results; else: the peer.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="What is held against it; the newest, if not given.")
    ] = None,
    peer: Annotated[str | None, typer.Option(help="A provider, if not the usual peer.")] = None,
    as_json: Json = False,
) -> None:
    """Ratios of medians, with 95% intervals: to the peer, or of one result to another."""
    rows = Results().of(name)
    ours, whom = chosen(rows, after), peer or find(name).peer
    if before is not None:
        found = list(between(ours, chosen(rows, before)))
    elif whom is not None:
        found = list(against(ours, whom))
    else:
        raise ConfigError(
            f"'{name}'", expected="a peer", got="none", fix="Give --peer or --before."
        )
    view.comparisons(found, as_json=as_json)


@app.command("tables")
def tables_(check: Check = False) -> None:
    """Write the tables of README.md and docs/ out of the newest rows."""
    _write(tables.stale(), check)


@app.command("plot")
def plot_(check: Check = False) -> None:
    """Draw the plots of docs/images/ out of the newest rows."""
    _write(plot.stale(), check)


def _size(quick: bool, full: bool) -> Size:
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    return "quick" if quick else "full" if full else "default"


def _wanted(names: list[str] | None, device: Device | None) -> list[Benchmark]:
    wanted = [find(name) for name in names] if names else REGISTRY
    return [benchmark for benchmark in wanted if device in (None, benchmark.device)]


def _write(stale: Iterable[tuple[Path, str]], check: bool) -> None:
    for path, text in (found := list(stale)):
        out.print(path, highlight=False)
        if not check:
            path.write_text(text)
    if check and found:
        errors.print("not what the newest rows say: 'make tables' writes them anew")
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a refusal is one message, never a traceback."""
    # As SIGINT: servers that were started are stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app(prog_name="python -m benchmarks")
    except EnchTableError as error:
        errors.print(f"[bold red]{type(error).__name__}[/bold red]", end=": ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
