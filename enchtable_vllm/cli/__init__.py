"""The command ``enchtable``.

Results go to standard output, progress and warnings to standard error. Exit codes: 0 done,
1 refused (the message says why and what to do), 2 wrong usage, 128 + N stopped by signal N.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from enchtable_vllm.cli import demo, merge, plan, vector
from enchtable_vllm.cli.output import errors
from enchtable_vllm.errors import EnchTableError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Give fine-tuned models their safety alignment back: build safety vectors, plan their "
    "merge, merge. To serve: [bold]vllm serve MODEL --load-format enchtable[/bold].",
)
app.add_typer(vector.app, name="vector")
app.command("plan")(plan.plan)
app.command("merge")(merge.merge)
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"enchtable-vllm {version('enchtable-vllm')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _stop(number: int, _: FrameType | None) -> None:
    errors.print(f"stopped by {signal.Signals(number).name}")
    sys.exit(128 + number)


def main() -> None:
    """Run the command; a refusal is one message and exit code 1, never a traceback."""
    for stop in (signal.SIGTERM, signal.SIGHUP):  # as SIGINT: what is half-written is removed
        if signal.getsignal(stop) is signal.SIG_DFL:  # nohup's stays
            signal.signal(stop, _stop)
    try:
        app()
    except EnchTableError as error:
        errors.print(f"[bold red]{type(error).__name__}[/bold red]", end=": ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: the system's own words
        errors.print(f"{type(error).__name__}: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
