"""``enchtable status``: what a server serves, by its own word."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from enchtable_vllm.cli.fleet_options import Access, ApiKeyOption, CaOption, UrlOption, one_target
from enchtable_vllm.cli.output import out, print_json, warn
from enchtable_vllm.errors import printable
from enchtable_vllm.fleet import Client
from enchtable_vllm.fleet.documents import NO_VECTOR, Status

_SHOWN_SWAPS = 5


def status(
    url: UrlOption,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's document.")] = False,
) -> None:
    """Show what a server serves: vector, plan, β, every rank, the last swaps."""
    access = Access(api_key_file=api_key_file, ca_file=ca_file)
    (client,) = access.connect([one_target(url)], admin=False)
    said = asyncio.run(_ask(client))
    if as_json:
        print_json(said.to_json())
    else:
        _print(url, said)


async def _ask(client: Client) -> Status:
    async with client:
        return await client.status()


def _print(url: str, said: Status) -> None:
    active = said.active
    good = said.state == "serving" and said.ready
    state = f"[{'green' if good else 'red'}]{said.state}{', ready' if said.ready else ''}[/]"
    desired = said.desired
    rows = {
        "server": _text(url),
        "state": state + (f" ({_text(said.reason)})" if said.reason else ""),
        "task model": f"{_text(said.task_model.id)} {_short(said.task_model.fingerprint)}",
        "safety vector": f"{_text(active.safety_vector)} {_short(active.vector_digest)}",
        "plan": f"{_short(active.plan_digest)}, beta {active.beta}, scope {_text(active.scope)}",
        "signed": _text(active.signed_by or "not required"),
        "merged": f"{active.merged} tensors, retained share {active.retained_share}",
        "version": f"{_text(said.weight_version)}, epoch {said.epoch}",
        "desired": "nothing" if desired is None else _text(desired.safety_vector),
        "rolls back to": _text(said.rolls_back_to or "nothing"),
    }
    if active.safety_vector == NO_VECTOR:
        del rows["plan"], rows["signed"], rows["merged"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    if said.engines:
        out.print(_ranks(said))
    if said.swaps:
        out.print(_swaps(said))
    if said.disagreeing:
        warn(f"{said.disagreeing} rank(s) do not serve what the server should")
    if said.as_desired is False:
        warn("a restart would serve something else: the vector root desires another vector")


def _ranks(said: Status) -> Table:
    table = Table("engine", "rank", "epoch", "vector", "plan", "beta", "", box=box.SIMPLE)
    for engine in said.engines:
        for rank in engine.ranks:
            table.add_row(
                str(engine.engine),
                str(rank.rank),
                str(rank.epoch),
                _short(rank.vector_digest),
                _short(rank.plan_digest),
                str(rank.beta),
                f"[red]{_text(rank.broken)}[/]" if rank.broken else "",
            )
    return table


def _swaps(said: Status) -> Table:
    table = Table("epoch", "from", "to", "outcome", "began", "", box=box.SIMPLE)
    for swap in said.swaps[:_SHOWN_SWAPS]:
        values = (swap.epoch, swap.from_, swap.to, swap.outcome, swap.began, swap.reason or "")
        table.add_row(*map(_text, values))
    return table


def _text(value: object) -> str:
    return escape(printable(value))


def _short(digest: str | None) -> str:
    return "none" if digest is None else _text(digest.removeprefix("blake3:")[:12])
