"""Consoles, progress bars and what else commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from enchtable_vllm.errors import printable
from enchtable_vllm.progress import Progress

out = Console()
errors = Console(stderr=True)


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on standard output, and nothing else."""
    print(json.dumps(value, indent=2))


def say(message: str) -> None:
    """A line on standard output, as it is: names in it are no markup, and it is not wrapped."""
    out.print(printable(message), markup=False, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """A warning on standard error."""
    errors.print("[bold yellow]warning:[/bold yellow]", end=" ")
    errors.print(printable(message), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on standard error that a library's progress callback moves."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[tensor]}"),
    )
    with Bars(*columns, console=errors, transient=True) as bars:
        task = bars.add_task(title, total=None, tensor="")

        def move(name: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, tensor=name)

        yield move
