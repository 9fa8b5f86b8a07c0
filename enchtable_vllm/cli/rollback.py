"""``enchtable rollback``: what a server served before its last swap."""

from __future__ import annotations

import asyncio

from enchtable_vllm.cli.fleet_options import (
    Access,
    AdminTokenOption,
    ApiKeyOption,
    CaOption,
    PatienceOption,
    RequestsOption,
    TimeoutOption,
    UrlOption,
    one_target,
    seconds,
)
from enchtable_vllm.cli.swap import EpochOption, JsonOption, report_seen
from enchtable_vllm.fleet import Client
from enchtable_vllm.fleet.documents import Served
from enchtable_vllm.fleet.exchange import How, Seen, roll_back


def rollback(
    url: UrlOption,
    requests: RequestsOption = "keep",
    expected_epoch: EpochOption = None,
    timeout: TimeoutOption = "10m",
    patience: PatienceOption = "60s",
    admin_token_file: AdminTokenOption = None,
    api_key_file: ApiKeyOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a server go back to what it served before its last swap.

    A second one goes one further back, never forth.
    """
    how = How(
        requests,
        timeout_seconds=seconds(timeout, "--timeout"),
        patience_seconds=seconds(patience, "--patience"),
    )
    access = Access(admin_token_file, api_key_file, ca_file)
    (client,) = access.connect([one_target(url)], admin=True)
    report_seen(asyncio.run(_rollback(client, how, expected_epoch)), as_json)


async def _rollback(client: Client, how: How, expected_epoch: int | None) -> Seen:
    async with client:
        before = Served.of(await client.status())
        if expected_epoch is not None:
            before = before.model_copy(update={"epoch": expected_epoch})
        return await roll_back(client, before, how)
