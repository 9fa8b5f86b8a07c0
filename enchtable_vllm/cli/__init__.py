"""The command ``enchtable``.

Results go to standard output, progress and warnings to standard error. Exit codes: 0 done,
1 refused (the message says why and what to do), 2 wrong usage, 128 + N stopped by signal N.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from enchtable_vllm.cli.output import errors
from enchtable_vllm.errors import ConfigError, EnchTableError

#: Each is a module here, imported when it is called: most bring in torch, which takes seconds,
#: may not be there, and may be what 'doctor' is to find broken.
COMMANDS = {
    "distill": "Distil a safety vector: train a surrogate toward compliance, and subtract it.",
    "vector": "Build, inspect, sign and verify safety vectors.",
    "plan": "Plan a merge: how much of the safety vector each matrix of a fine-tune can take.",
    "report": "Show a merge plan to people: one page that needs no network.",
    "merge": "Merge offline, for whoever does not run vLLM.",
    "doctor": "Check this environment, and what a server would do with a model.",
    "status": "Show what a server serves: vector, plan, β, every rank, the last swaps.",
    "swap": "Exchange a server's safety vector while it serves.",
    "rollback": "Let a server go back to what it served before its last swap.",
    "rollout": "Give many servers one vector: canaries, then steps, a check after each.",
    "eval": "Measure a served model: unsafe answers, refusals, over-refusal, utility.",
    "compare": "Put evaluated models side by side, with paired significance.",
    "tune": "Find a β: sweep it on one live server, and draw safety against utility.",
    "demo": "Train, distil, plan, merge and serve a real small model, and show what it does.",
}


class _Lazy(TyperGroup):
    """Puts the real command in place of its one-line stand-in once it is called for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.add_command(load(args[0]), args[0])
        return super().resolve_command(ctx, args)


def load(name: str) -> Any:
    """The real command, or group of commands, of a name in `COMMANDS`.

    Raises:
        ConfigError: It needs torch, and there is none.
    """
    try:
        module = import_module(f"enchtable_vllm.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            f"'enchtable {name}'",
            expected="torch in this environment",
            got="none",
            fix="Install the build for your device, or vLLM, which brings its own; "
            "'enchtable doctor' works without.",
        ) from error
    group: typer.Typer | None = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(add_completion=False, rich_markup_mode="rich")
        group.command(name)(getattr(module, name))
    return typer.main.get_command(group)


app = typer.Typer(
    cls=_Lazy,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Give fine-tuned models their safety alignment back: build safety vectors, plan their "
    "merge, merge. To serve: [bold]vllm serve MODEL --load-format enchtable[/bold].",
)
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)


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


#: What told this command to stop.
_told: list[int] = []


def _stop(number: int, _: FrameType | None) -> None:
    _told.append(number)
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
        if _told:  # a library took the exit for a failure of what it was doing
            sys.exit(128 + _told[0])
        errors.print(f"[bold red]{type(error).__name__}[/bold red]", end=": ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: the system's own words
        errors.print(f"{type(error).__name__}: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
