"""One server's swap, and the way back: sent, and then seen.

A connection may break after a request left and before its answer came. What became of it is
never assumed: the server is asked what it serves. A request is sent again only with the epoch
that it was meant for, so that the first one, should it arrive late, makes the second one fail.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from enchtable_vllm.errors import EnchTableError, summarize_faults
from enchtable_vllm.fleet.client import Client, ServerRefused, Unreachable
from enchtable_vllm.fleet.documents import Goal, Pause, Served, Status, Swapped

_ATTEMPTS = 3
_POLL_SECONDS = 0.5
#: A 409 that, after an earlier attempt of ours, may be that attempt's own doing.
_ECHOES = ("swap_in_progress", "wrong_epoch")


class NotAsAsked(EnchTableError):
    """A server does not serve what it was asked to."""


@dataclass(frozen=True)
class How:
    """How to swap.

    Attributes:
        pause: What becomes of running requests.
        persist: Also write the vector root's ``current.json``.
        timeout_seconds: For staging.
        patience_seconds: How long a server may be out of reach before its state is unknown.
    """

    pause: Pause = "keep"
    persist: bool = False
    timeout_seconds: float = 600.0
    patience_seconds: float = 60.0


@dataclass(frozen=True)
class Seen:
    """What a server serves now.

    Attributes:
        status: Its own word, after the change.
        seen_by: The answer to the change; or the status alone, after an answer was lost.
        answer: The answer, if it came.
    """

    status: Status
    seen_by: Literal["answer", "status"]
    answer: Swapped | None = None

    @property
    def served(self) -> Served:
        """To remember."""
        return Served.of(self.status)


async def swap(
    client: Client, safety_vector: str, beta: float | None, goal: Goal, before: Served, how: How
) -> Seen:
    """Exchange a server's vector, if it still is at the epoch that it was seen at.

    Args:
        client: The server.
        safety_vector: What to ask for.
        beta: Another β than the plan's.
        goal: What is to be served then, as far as it is known.
        before: What was served when it was last looked at.
        how: Pausing, persisting, patience.

    Raises:
        ServerRefused: It refused; somebody else's swap came between (``wrong_epoch``).
        Unreachable: It cannot be asked what became of it.
        NotAsAsked: It swapped, and something of it does not agree.
    """
    attempt = 0
    while True:
        try:
            answer = await client.swap(
                safety_vector,
                beta=beta,
                pause=how.pause,
                persist=how.persist,
                expected_epoch=before.epoch,
                timeout_seconds=how.timeout_seconds,
            )
        except (ServerRefused, Unreachable) as error:
            if not _may_have_worked(error, attempt):
                raise
            status = await settled(client, how)
            if goal.met_by(status.active) or not Served.of(status).same(before):
                require(client, status, goal)  # what it is instead is in the message
                return Seen(status, "status")
            attempt += 1
            if attempt == _ATTEMPTS:
                raise
        else:
            status = await settled(client, how)
            require(client, status, Goal.of(answer.active))
            require(client, status, goal)
            return Seen(status, "answer", answer)


async def roll_back(client: Client, before: Served, how: How) -> Seen:
    """Have a server go one step back, whatever that is, if it still is where it was seen.

    Raises:
        ServerRefused: There is no step back, or not to those very bytes.
        Unreachable: It did not happen, or it cannot be asked whether it did.
        NotAsAsked: It happened, and something does not agree.
    """
    try:
        answer = await client.rollback(
            pause=how.pause, expected_epoch=before.epoch, timeout_seconds=how.timeout_seconds
        )
    except (ServerRefused, Unreachable) as error:
        if not _may_have_worked(error, 0):
            raise
        status = await settled(client, how)
        if not status.swaps or status.swaps[0].outcome != "rolled_back":
            raise
        if status.epoch == before.epoch:  # the newest was there before
            raise
        return Seen(status, "status")
    status = await settled(client, how)
    require(client, status, Goal.of(answer.active))
    return Seen(status, "answer", answer)


async def bring_back(client: Client, before: Served, goal: Goal, how: How) -> Served:
    """Make a server serve again what it served before our swap.

    By its own rollback where that leads there, which restores the very plan; by a swap where it
    does not: a server that was restarted has no history. One that serves neither ours nor what
    it served before was changed by somebody else, and is left alone.

    Args:
        client: The server.
        before: What it served.
        goal: What we made, or may have made, of it.
        how: Pausing, persisting, patience.

    Returns:
        What it serves now.

    Raises:
        ServerRefused: It could not be brought back.
        Unreachable: The same, and it cannot be asked what it serves.
        NotAsAsked: It serves something else, before or after.
    """
    lost: EnchTableError | None = None
    touched = False
    for attempt in range(_ATTEMPTS + 1):
        status = await settled(client, how)
        served = Served.of(status)
        if served.same(before) and status.state == "serving":
            require(client, status, Goal.of(before))
            return served
        if not (touched or goal.met_by(served) or status.state == "failed"):
            raise NotAsAsked(
                f"server {client.target.url}",
                expected=f"what was swapped in, or what was there before ({before})",
                got=f"{served}",
                fix="Somebody else changed it, so it was left as it is: agree, then swap it.",
            )
        if attempt == _ATTEMPTS:
            break
        # A server that failed goes back before it does anything else: its history is not ours.
        leads_there = status.state == "serving" and status.rolls_back_to == before.safety_vector
        by_history = attempt == 0 and leads_there
        try:
            await _send_back(client, before, status.epoch, how, by_history=by_history)
            lost, touched = None, True
        except (ServerRefused, Unreachable) as error:
            if not (by_history or _may_have_worked(error, attempt)):
                raise
            lost = error
    raise lost or NotAsAsked(
        f"server {client.target.url}", expected=f"{before}", got=f"{served}", fix="Swap it by hand."
    )


async def persist_again(
    client: Client, abandoned: tuple[str, float | None], before: Served | None, how: How
) -> None:
    """Have a server's vector root name what it serves, where it still names what was given up.

    A rollback undoes what its swap wrote to the root's ``current.json``. Where servers share a
    root, only the first one's swap knows what stood there before, and the first one may be dead.

    Args:
        client: The server; one that never was changed will do.
        abandoned: The vector and β that were rolled back.
        before: What it served before the roll-out, where that is known: whether β was the plan's.
        how: Pausing, persisting, patience.

    Raises:
        ServerRefused: It cannot be written.
        Unreachable: No answer came.
    """
    status = await client.status()
    desired, active = status.desired, status.active
    if status.as_desired is not False or desired is None:
        return
    if (desired.safety_vector, desired.beta) == abandoned:
        again = before is not None and Served.of(status).same(before)
        await client.swap(
            active.safety_vector,
            beta=before.beta_to_ask if before is not None and again else active.beta,
            pause=how.pause,
            persist=True,
            expected_epoch=status.epoch,
            timeout_seconds=how.timeout_seconds,
        )


async def _send_back(
    client: Client, before: Served, epoch: int, how: How, *, by_history: bool
) -> None:
    if by_history:
        await client.rollback(
            pause=how.pause, expected_epoch=epoch, timeout_seconds=how.timeout_seconds
        )
        return
    await client.swap(
        before.safety_vector,
        beta=before.beta_to_ask,
        pause=how.pause,
        persist=how.persist,
        expected_epoch=epoch,
        timeout_seconds=how.timeout_seconds,
    )


async def settled(client: Client, how: How) -> Status:
    """A server's status once no swap is running on it.

    Raises:
        Unreachable: It did not answer for as long as patience lasts.
        ServerRefused: It does not say; or a swap outlasts its own time.
    """
    out_of_reach_since = began = time.monotonic()
    while True:
        try:
            status = await client.status()
            if status.state != "swapping":
                return status
            now = out_of_reach_since = time.monotonic()
            if now - began > how.timeout_seconds + how.patience_seconds:
                raise NotAsAsked(
                    f"server {client.target.url}",
                    expected=f"a swap to end within {how.timeout_seconds:.0f} s",
                    got="one that goes on",
                    fix="See the server's log.",
                )
        except (Unreachable, ServerRefused) as error:
            settles = isinstance(error, ServerRefused) and error.status < 500
            if settles or time.monotonic() - out_of_reach_since > how.patience_seconds:
                raise
        await asyncio.sleep(_POLL_SECONDS)


def faults(status: Status, goal: Goal) -> list[str]:
    """What in a status is not as it should be; empty if all engines and ranks agree with it."""
    served = Served.of(status)
    found = []
    if status.state != "serving":
        found.append(f"state '{status.state}': {status.reason}")
    if not status.ready:
        found.append(f"not ready: {status.reason}")
    if not goal.met_by(served):
        found.append(f"serves {served}, not {goal.safety_vector} as asked")
    if status.disagreeing:
        found.append(f"{status.disagreeing} rank(s) disagree")
    for engine in status.engines:
        for rank in engine.ranks:
            name = f"engine {engine.engine}, rank {rank.rank}"
            if rank.broken:
                found.append(f"{name} is broken: {rank.broken}")
            elif not goal.met_by(rank):
                found.append(f"{name} computes with other weights")
    return found


def require(client: Client, status: Status, goal: Goal) -> None:
    """Refuse a status that has `faults`.

    Raises:
        NotAsAsked: With them.
    """
    if found := faults(status, goal):
        raise NotAsAsked(
            f"server {client.target.url}",
            expected=f"'{goal.safety_vector}' on every rank",
            got=summarize_faults(found),
            fix="See 'enchtable status' and the server's log.",
        )


def _may_have_worked(error: EnchTableError, attempt: int) -> bool:
    """Whether only the server's status can tell what became of a request."""
    if isinstance(error, ServerRefused):
        return not error.settles_it or (attempt > 0 and error.code in _ECHOES)
    return isinstance(error, Unreachable)
