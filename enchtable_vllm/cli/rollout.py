"""``enchtable rollout``: one vector for many servers, step by step, and back when one fails."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from enchtable_vllm.cli.fleet_options import (
    Access,
    AdminTokenOption,
    ApiKeyOption,
    BetaOption,
    CaOption,
    PatienceOption,
    RequestsOption,
    TimeoutOption,
    VectorOption,
    seconds,
)
from enchtable_vllm.cli.rollout_view import shown
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet import Client, Target
from enchtable_vllm.fleet.checks import PROMPTS, built_in, program, read_prompts
from enchtable_vllm.fleet.exchange import How
from enchtable_vllm.fleet.journal import Journal, Request
from enchtable_vllm.fleet.preflight import Wish
from enchtable_vllm.fleet.rollout import Pace, Rollout
from enchtable_vllm.fleet.targets import read_targets, resolve_targets


def rollout(
    safety_vector: VectorOption,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="A file with a URL on each line, or dns://service.namespace:8000 for each "
            "address behind that name. Repeatable.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="One server. Repeatable.", show_default=False)
    ] = None,
    beta: BetaOption = None,
    canary: Annotated[int, typer.Option(min=0, help="How many are changed before all others.")] = 1,
    max_unavailable: Annotated[
        int, typer.Option(min=1, help="How many may be changed at the same time.")
    ] = 1,
    pause: Annotated[str, typer.Option(help="Between a step and its check: 90, 60s, 1h30m.")] = (
        "30s"
    ),
    check: Annotated[
        str | None,
        typer.Option(
            help="A program, with arguments and without a shell, in place of the built-in check: "
            "0 goes on. It finds ENCHTABLE_URLS, ENCHTABLE_SAFETY_VECTOR and "
            "ENCHTABLE_WEIGHT_VERSION in its environment.",
            show_default=False,
        ),
    ] = None,
    check_timeout: Annotated[str, typer.Option(help="For that program.")] = "10m",
    prompts: Annotated[
        Path | None,
        typer.Option(help="For the built-in check: one prompt a line.", show_default=False),
    ] = None,
    requests: RequestsOption = "keep",
    no_dry_run: Annotated[
        bool, typer.Option("--no-dry-run", help="Do not stage on every server beforehand.")
    ] = False,
    allow_mixed_models: Annotated[
        bool, typer.Option("--allow-mixed-models", help="Servers may serve different fine-tunes.")
    ] = False,
    abort: Annotated[
        bool, typer.Option("--abort", help="Roll back what an interrupted run of this changed.")
    ] = False,
    keep_on_interrupt: Annotated[
        bool, typer.Option("--keep-on-interrupt", help="A signal does not roll back.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            help="The journal. Default: in ENCHTABLE_CACHE, by targets, vector and β.",
            show_default=False,
        ),
    ] = None,
    timeout: TimeoutOption = "10m",
    patience: PatienceOption = "60s",
    admin_token_file: AdminTokenOption = None,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object for each event, in a terminal too.")
    ] = False,
) -> None:
    """Give many servers one vector: canaries, then steps, a check after each.

    When anything fails, all that was changed is rolled back, the newest first. Run again, it
    continues an interrupted run; what serves the vector already is left alone.

    Exit codes: 0 done, 1 refused before anything was changed, 2 wrong usage, 3 rolled back, 4
    mixed (each target is listed), 128 + N stopped by signal N.
    """
    if check is not None and prompts is not None:
        raise typer.BadParameter("it excludes --check", param_hint="--prompts")
    named = _named(targets or [], url or [])
    request = Request(targets=tuple(named), safety_vector=safety_vector, beta=beta)
    how = How(requests, True, seconds(timeout, "--timeout"), seconds(patience, "--patience"))
    wish = Wish(safety_vector, beta, not no_dry_run, allow_mixed_models, how.timeout_seconds)
    pace = Pace(canary, max_unavailable, seconds(pause, "--pause"), keep_on_interrupt)
    access = Access(admin_token_file, api_key_file, ca_file)
    if check is not None:
        checking = program(check, timeout_seconds=seconds(check_timeout, "--check-timeout"))
    else:
        checking = built_in(PROMPTS if prompts is None else read_prompts(prompts))
    with (
        Journal(state or request.state_file(), request) as journal,
        shown(as_json=as_json or not sys.stdout.isatty()) as listener,
    ):
        made = partial(Rollout, wish, pace, how, checking, journal, listener)
        code = asyncio.run(_run(made, request, journal, access, abort=abort))
    raise typer.Exit(code)


def _named(targets: list[str], urls: list[str]) -> list[str]:
    if not targets and not urls:
        raise typer.BadParameter("at least one is needed", param_hint="--url / --targets")
    if not all(url.startswith(("http://", "https://")) for url in urls):
        raise typer.BadParameter("it begins with http:// or https://", param_hint="--url")
    return read_targets([*urls, *targets])


async def _run(
    make: Callable[[Sequence[Client]], Rollout],
    request: Request,
    journal: Journal,
    access: Access,
    *,
    abort: bool,
) -> int:
    if abort and not journal.changed():
        raise ConfigError(
            f"--abort, state file '{journal.path}'",
            expected="an interrupted roll-out of these targets, this vector and β",
            got="none",
            fix="'enchtable rollback' takes one server back.",
        )
    resolved = await resolve_targets(request.targets)
    urls = {target.url for target in resolved}
    gone = [
        Target(url, record.server_name)
        for url, record in journal.records.items()
        if url not in urls
    ]
    clients = access.connect([*resolved, *gone], admin=True)
    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        run = make(clients)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's stays
                loop.add_signal_handler(number, run.interrupt, number)
        return await run.run(abort=abort, gone=[target.url for target in gone])
