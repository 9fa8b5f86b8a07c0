"""``enchtable swap``: another safety vector, on one server, while it serves."""

from __future__ import annotations

import asyncio
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
    UrlOption,
    VectorOption,
    one_target,
    seconds,
)
from enchtable_vllm.cli.output import print_json, say, warn
from enchtable_vllm.errors import MismatchError
from enchtable_vllm.fleet import Client
from enchtable_vllm.fleet.documents import Served, Swapped
from enchtable_vllm.fleet.exchange import How, Seen
from enchtable_vllm.fleet.exchange import swap as exchange
from enchtable_vllm.fleet.preflight import Wish, verify

EpochOption = Annotated[
    int | None,
    typer.Option(help="Refuse unless the server is at this epoch. Default: that of now."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's document.")]


def swap(
    url: UrlOption,
    safety_vector: VectorOption,
    beta: BetaOption = None,
    requests: RequestsOption = "keep",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stage and check on every rank, then drop it.")
    ] = False,
    persist: Annotated[
        bool, typer.Option("--persist", help="Restarted servers of its vector root serve it too.")
    ] = False,
    expected_epoch: EpochOption = None,
    timeout: TimeoutOption = "10m",
    patience: PatienceOption = "60s",
    admin_token_file: AdminTokenOption = None,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exchange a server's safety vector while it serves.

    For more than one server there is 'enchtable rollout'.
    """
    how = How(requests, persist, seconds(timeout, "--timeout"), seconds(patience, "--patience"))
    by_list = not (safety_vector.startswith("@") or "/" in safety_vector)
    wish = Wish(safety_vector, beta, not by_list, timeout_seconds=how.timeout_seconds)
    access = Access(admin_token_file, api_key_file, ca_file)
    (client,) = access.connect([one_target(url)], admin=True)
    if dry_run:
        report(asyncio.run(_try(client, wish, expected_epoch)), as_json)
    else:
        report_seen(asyncio.run(_swap(client, wish, how, expected_epoch)), as_json)


async def _try(client: Client, wish: Wish, expected_epoch: int | None) -> Swapped:
    async with client:
        return await client.swap(
            wish.safety_vector,
            beta=wish.beta,
            dry_run=True,
            expected_epoch=expected_epoch,
            timeout_seconds=wish.timeout_seconds,
        )


async def _swap(client: Client, wish: Wish, how: How, expected_epoch: int | None) -> Seen:
    async with client:
        verified, refusals = await verify([client], wish)
        if refusals:
            raise MismatchError(
                f"server {client.target.url}",
                expected=f"one that can serve '{wish.safety_vector}'",
                got=refusals[0].reason,
                fix="Nothing was changed.",
            )
        (one,) = verified.values()
        before = one.served
        if expected_epoch is not None:
            before = before.model_copy(update={"epoch": expected_epoch})
        return await exchange(client, wish.safety_vector, wish.beta, one.goal, before, how)


def report_seen(seen: Seen, as_json: bool) -> None:
    """A change, by its answer; by the server's status where the answer was lost."""
    if seen.answer is not None:
        report(seen.answer, as_json)
        return
    warn("the connection broke before the answer; the server's status says that it was done")
    if as_json:
        print_json({"outcome": "seen_by_status", "status": seen.status.to_json()})
    else:
        say(f"serves {Served.of(seen.status)}")


def report(answer: Swapped, as_json: bool) -> None:
    """The server's answer to a change."""
    for warning in answer.warnings:
        warn(warning)
    if as_json:
        print_json(answer.to_json())
        return
    words = {
        "swapped": f"swapped from {answer.from_} to {answer.to}",
        "rolled_back": f"rolled back from {answer.from_} to {answer.to}",
        "unchanged": "unchanged: this very vector, plan and beta were served already",
        "dry_run": "dry run: staged and checked on every rank, nothing changed",
    }
    active = answer.active
    say(f"{words[answer.outcome]}; beta {active.beta}, epoch {answer.epoch}")
    if answer.paused_seconds is not None:
        say(f"generation paused for {answer.paused_seconds:.3f} s")
    if answer.outcome in ("swapped", "rolled_back") and not answer.persisted:
        say("not persisted: a restart serves what the server's options, or current.json, name")
