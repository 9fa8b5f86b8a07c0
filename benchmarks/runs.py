"""Runs the benchmarks that a command names, shows their figures and keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from benchmarks import view
from benchmarks.harness.options import Size
from benchmarks.harness.registry import Benchmark
from benchmarks.harness.rows import RESULTS, append
from benchmarks.harness.run import run, unavailable
from enchtable_vllm.cli.output import errors

#: The exit code where all was right and measured, and a target was missed.
MISSED = 3


@dataclass(frozen=True)
class Wish:
    """How to run them.

    Attributes:
        size: See `Size`.
        assignments: Options, ``name=value``.
        measured: Or only verified.
        written: Whether rows are kept; those of a quick run never are.
        as_json: Rows are printed as JSON.
    """

    size: Size = "default"
    assignments: tuple[str, ...] = ()
    measured: bool = True
    written: bool = True
    as_json: bool = False

    def command(self, name: str) -> list[str]:
        """Of one of several."""
        words = [sys.executable, "-m", "benchmarks", "run" if self.measured else "verify", name]
        words += [] if self.size == "default" else [f"--{self.size}"]
        words += [] if self.written else ["--no-write"]
        return words + (["--json"] if self.as_json else [])


def run_all(wanted: Sequence[Benchmark], wish: Wish) -> int:
    """Run one here, several each in a process of its own: what one imports hinders another.

    Returns:
        The exit code: 0, or `MISSED`, or that of something which failed. What this machine cannot
        run is skipped, and said to be.
    """
    ready = []
    for benchmark in wanted:
        if (why := unavailable(benchmark.device)) is None:
            ready.append(benchmark)
        else:
            errors.print(f"{benchmark.name}: skipped: it {why}", highlight=False, soft_wrap=True)
    if len(ready) == 1:
        return _here(ready[0], wish)
    if wish.assignments:
        raise typer.BadParameter("options are one benchmark's: name it")
    return _each(ready, wish)


def _each(ready: Sequence[Benchmark], wish: Wish) -> int:
    ended: dict[str, int] = {}
    rows: list[Any] = []
    for benchmark in ready:
        output = subprocess.PIPE if wish.as_json else None
        done = subprocess.run(wish.command(benchmark.name), stdout=output, check=False)
        ended[benchmark.name] = done.returncode
        if wish.as_json and done.stdout:
            rows += json.loads(done.stdout)
    if wish.as_json:
        view.print_json(rows)
    missed = [name for name, code in ended.items() if code == MISSED]
    failed = [name for name, code in ended.items() if code not in (0, MISSED)]
    for what, names in (("targets missed", missed), ("failed", failed)):
        if names:
            errors.print(f"{what}: {', '.join(names)}", highlight=False)
    return 1 if failed else MISSED if missed else 0


def _here(benchmark: Benchmark, wish: Wish) -> int:
    started = time.monotonic()
    rows = run(benchmark, wish.size, wish.assignments, measured=wish.measured, say=_say)
    if not wish.measured:
        _say(f"{benchmark.name}: verified")
        return 0
    view.rows(rows, benchmark.peer, as_json=wish.as_json)
    if wish.written and wish.size != "quick":
        path = RESULTS / f"{benchmark.name}.csv"
        append(rows, path)
        _say(f"{len(rows)} rows appended to {path}")
    _say(f"{benchmark.name}: {time.monotonic() - started:.0f} s in all")
    missed = [] if wish.size == "quick" else benchmark.missed(rows)  # one round claims nothing
    for words in missed:
        errors.print(f"[bold red]missed:[/bold red] {words}", highlight=False, soft_wrap=True)
    return MISSED if missed else 0


def _say(text: str) -> None:
    errors.print(text, highlight=False, soft_wrap=True)
