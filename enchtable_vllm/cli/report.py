"""``enchtable report``: one page about one merge plan."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from enchtable_vllm.checkpoint import FileTransaction
from enchtable_vllm.cli.fleet_options import (
    Access,
    ApiKeyOption,
    BetaOption,
    CaOption,
    one_target,
)
from enchtable_vllm.cli.options import JsonOption
from enchtable_vllm.cli.output import print_json, say, warn
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.plan import PLAN_FILE, read_plan, resolve_plan
from enchtable_vllm.report import collect, report_page
from enchtable_vllm.report.printed import Merged, Planned
from enchtable_vllm.report.served import Served, ask
from enchtable_vllm.vector import SafetyVector, Scope


def report(
    plan: Annotated[Path, typer.Option(help=f"{PLAN_FILE}, from 'enchtable plan'.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page: a file of HTML. Without it, give --json."),
    ] = None,
    safety_vector: Annotated[
        str | None,
        typer.Option(help="Its vector: also say where that comes from.", show_default=False),
    ] = None,
    plan_report: Annotated[
        Path | None,
        typer.Option(help="What 'enchtable plan --json' printed.", show_default=False),
    ] = None,
    merge_report: Annotated[
        Path | None,
        typer.Option(help="What 'enchtable merge --json' printed.", show_default=False),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="A server: also say what it serves.", show_default=False),
    ] = None,
    beta: BetaOption = None,
    scope: Annotated[
        Scope | None, typer.Option(help="A part of the plan's scope.", show_default=False)
    ] = None,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a merge plan to people: one page that needs no network.

    Interference, attenuation, coefficient and retained share for each layer and module, their
    distributions, the norms, where everything comes from, and what to look into.
    """
    if output is None and not as_json:
        raise typer.BadParameter("give it, or --json", param_hint="--output")
    target = None if server is None else one_target(server)
    made, digest = read_plan(plan)
    resolved = resolve_plan(made, digest, beta=beta, scope=scope)
    planned = None if plan_report is None else Planned.read(plan_report)
    merged = None if merge_report is None else Merged.read(merge_report)
    vector = None if safety_vector is None else SafetyVector.open(safety_vector)
    if output is not None:
        given = [path for path in (plan, plan_report, merge_report) if path is not None]
        _refuse_input(output, given, vector)
    served: Served | None = None
    if target is not None:
        access = Access(api_key_file=api_key_file, ca_file=ca_file)
        (client,) = access.connect([target], admin=False)
        served = asyncio.run(ask(client))
    facts = collect(resolved, vector=vector, planned=planned, merged=merged, served=served)
    if output is not None:
        with FileTransaction(output) as partial:
            partial.write_text(report_page(facts), encoding="utf-8")
    for warning in facts.warnings:
        warn(warning)
    if as_json:
        print_json(facts.to_json())
    elif output is not None:
        say(f"report written to {output}")


def _refuse_input(output: Path, inputs: list[Path], vector: SafetyVector | None) -> None:
    """A page never replaces what it is about."""
    taken = {path.resolve() for path in inputs}
    home = None if vector is None else vector.location.path.resolve()
    if output.resolve() in taken or output.resolve().parent == home:
        raise ConfigError(
            "--output",
            expected="another place than the inputs'",
            got=f"'{output}'",
            fix="Choose another name, such as report.html.",
        )
