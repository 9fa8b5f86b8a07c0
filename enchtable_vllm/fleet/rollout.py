"""One vector for all servers: canaries, then steps; a check after each; back when one fails.

Everything that decides is written down before it is done (`journal`), and read from the servers
rather than remembered (`exchange`). So a roll-out that was killed is continued by running it
again, and one that is run twice changes nothing the second time.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from enchtable_vllm.errors import ConfigError, EnchTableError, summarize_faults
from enchtable_vllm.fleet.checks import Changed, Check
from enchtable_vllm.fleet.client import Client, ServerRefused, Unreachable
from enchtable_vllm.fleet.documents import NO_VECTOR, Served
from enchtable_vllm.fleet.events import Event, EventKind, Listener, Outcome, exit_code
from enchtable_vllm.fleet.exchange import How, bring_back, persist_again, swap
from enchtable_vllm.fleet.journal import Journal, Record
from enchtable_vllm.fleet.preflight import Refusal, Verified, Wish, verify
from enchtable_vllm.fleet.schedule import plan_steps

_T = TypeVar("_T")
#: On the way back, silent servers wait until all others are back.
_GLANCE_SECONDS = 3.0
State = Literal["swapped", "already", "untouched", "restored", "lost"]


@dataclass(frozen=True)
class Pace:
    """How fast.

    Attributes:
        canaries: How many servers come before all others.
        at_once: How many may be changed at the same time.
        pause_seconds: Between a step and its check.
        keep_on_interrupt: A signal leaves what was changed as it is.
    """

    canaries: int = 1
    at_once: int = 1
    pause_seconds: float = 30.0
    keep_on_interrupt: bool = False


class _Failed(Exception):
    """A step did: its words are the reason."""


class _Interrupted(Exception):
    """By a signal; what was in flight has ended."""


class Rollout:
    """One roll-out, once.

    Args:
        wish: What they are to serve.
        pace: How fast.
        how: How to swap each.
        check: Run after each step, on everything that was changed so far.
        journal: Open.
        listener: Told of everything.
        clients: The servers, open, in the order in which they are to be changed.
    """

    def __init__(
        self,
        wish: Wish,
        pace: Pace,
        how: How,
        check: Check,
        journal: Journal,
        listener: Listener,
        clients: Sequence[Client],
    ) -> None:
        self._clients = {client.target.url: client for client in clients}
        self._wish, self._pace, self._how = wish, pace, how
        self._check, self._journal, self._listener = check, journal, listener
        self._already: set[str] = set()
        self._verified: dict[str, Verified] = {}
        self._signal: int | None = None
        self._stop = asyncio.Event()

    def interrupt(self, number: int) -> None:
        """Stop after what is in flight; a signal handler's."""
        back = self._journal.going_back is not None
        then = "goes on" if back else "keeps" if self._pace.keep_on_interrupt else "rolls back"
        self._tell("interrupted", signal=signal.Signals(number).name, then=then)
        if self._signal is None and not back:
            self._signal = number
            self._stop.set()

    async def run(self, *, abort: bool = False, gone: Sequence[str] = ()) -> int:
        """All of it.

        Args:
            abort: Roll back what an earlier run changed, and do nothing else.
            gone: Servers of an earlier run that are not named any longer. One that still
                answers takes part; one that does not is forgotten.

        Returns:
            The exit code.
        """
        self._tell(
            "began",
            safety_vector=self._wish.safety_vector,
            beta=self._wish.beta,
            targets=list(self._clients),
            state_file=str(self._journal.path),
        )
        await self._forget(gone)
        if self._journal.resumed:
            self._tell(
                "resumed",
                changed=list(self._journal.changed()),
                going="back" if abort or self._journal.going_back else "forward",
            )
        outcome = await self._run(abort)
        with suppress(ConfigError):  # the end can be told without it
            if self._journal.records:
                self._journal.finish(outcome)
        code = exit_code(outcome, self._signal)
        standing = await asyncio.gather(*map(self._standing, self._clients.values()))
        self._tell("ended", outcome=outcome.value, exit_code=code, targets=standing)
        return code

    async def _run(self, abort: bool) -> Outcome:
        reason = self._journal.going_back or ("--abort" if abort else None)
        try:
            if reason is None:
                return await self._forward()
        except _Failed as failed:
            reason = str(failed)
        except _Interrupted:
            if self._pace.keep_on_interrupt and self._journal.changed():
                return Outcome.KEPT
            reason = f"stopped by {signal.Signals(self._signal or 0).name}"
        return await self._back(reason)

    async def _forward(self) -> Outcome:
        verified, refusals = await verify(list(self._clients.values()), self._wish)
        refusals += self._reconcile(verified)
        if refusals:
            for refusal in refusals:
                self._tell("refused", url=refusal.url, reason=refusal.reason)
            return Outcome.MIXED if self._journal.changed() else Outcome.REFUSED
        self._verified = verified
        to_do = self._to_do(verified)
        earlier = len(self._journal.changed())
        if earlier:  # its check may be what an earlier run did not come to
            await self._wait_and_check()
        canaries = max(0, self._pace.canaries - earlier)
        steps = plan_steps(to_do, canaries=canaries, at_once=self._pace.at_once)
        for number, step in enumerate(steps, 1):
            self._raise_if_interrupted()
            self._tell("step", step=number, steps=len(steps), urls=step)
            failures = await asyncio.gather(*(self._swap(url, verified[url]) for url in step))
            if any(failures):
                raise _Failed("; ".join(filter(None, failures)))
            await self._wait_and_check()
        return Outcome.DONE

    def _to_do(self, verified: dict[str, Verified]) -> list[str]:
        """URLs of what is neither swapped by us nor served already."""
        if self._wish.safety_vector == NO_VECTOR:
            self._tell("warning", url=None, reason="no vector: task models as they were trained")
        rest = {url: one for url, one in verified.items() if url not in self._journal.records}
        self._already = {url for url, one in rest.items() if one.there_already}
        to_do = [url for url in rest if url not in self._already]
        for url, one in verified.items():
            self._tell("verified", url=url, serves=_facts(one.served), to_do=url in to_do)
        return to_do

    def _reconcile(self, verified: dict[str, Verified]) -> list[Refusal]:
        """Compare what the journal says of an earlier run with what servers serve."""
        refusals = []
        for url, record in list(self._journal.records.items()):
            one = verified.get(url)
            if one is None:  # refused already
                continue
            if one.goal.met_by(one.served):
                version = one.served.weight_version
                update = {"state": "swapped", "goal": one.goal, "weight_version": version}
                self._journal.set(url, record.model_copy(update=update))
            elif one.served.same(record.before):  # it never took, or the server was restarted
                self._journal.forget(url)
            else:
                got = f"it serves {one.served}, neither this nor what it did before"
                refusals.append(Refusal(url, f"{got} ({record.before})"))
        return refusals

    async def _swap(self, url: str, verified: Verified) -> str | None:
        """Change one server; what went wrong, if anything did."""
        wish, before = self._wish, verified.served
        server_name = self._clients[url].target.server_name
        record = Record(
            state="asked",
            before=before,
            as_desired=verified.status.as_desired,
            goal=verified.goal,
            server_name=server_name,
        )
        try:
            self._journal.set(url, record)
            self._tell("swapping", url=url)
            seen = await swap(
                self._clients[url], wish.safety_vector, wish.beta, verified.goal, before, self._how
            )
            version = seen.served.weight_version
            update = {"state": "swapped", "weight_version": version}
            self._journal.set(url, record.model_copy(update=update))
        except EnchTableError as error:
            self._tell("failed", url=url, code=_code(error), reason=str(error))
            return str(error)
        answer = seen.answer
        paused = answer.paused_seconds if answer is not None else None
        serves = _facts(seen.served)
        self._tell("swapped", url=url, serves=serves, paused_seconds=paused, seen_by=seen.seen_by)
        for warning in answer.warnings if answer is not None else ():
            self._tell("warning", url=url, reason=warning)
        return None

    async def _wait_and_check(self) -> None:
        self._raise_if_interrupted()
        if self._pace.pause_seconds:
            self._tell("waiting", seconds=self._pace.pause_seconds)
            await self._unless_interrupted(asyncio.sleep(self._pace.pause_seconds))
        changed = [
            Changed(self._clients[url], record.goal, record.weight_version)
            for url, record in self._journal.records.items()
        ]
        self._tell("checking", urls=[one.client.target.url for one in changed])
        faults = await self._unless_interrupted(self._check(changed))
        self._tell("checked", ok=not faults, faults=faults)
        if faults:
            raise _Failed(f"the check: {summarize_faults(faults)}")

    async def _unless_interrupted(self, work: Coroutine[None, None, _T]) -> _T:
        """Waits and checks change nothing, so they need not end."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            self._raise_if_interrupted()
            return task.result()
        finally:
            for future in (task, stop):
                future.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    def _raise_if_interrupted(self) -> None:
        if self._stop.is_set():
            raise _Interrupted

    async def _back(self, reason: str) -> Outcome:
        """Bring back whatever is, or may be, changed: the newest first, and none left out."""
        with suppress(ConfigError):  # see _note
            self._journal.turn_back(reason)
        await self._find_restarted()
        urls = self._journal.changed()[::-1]
        self._tell("rolling_back", reason=reason, urls=urls)
        glance = min(_GLANCE_SECONDS, self._how.patience_seconds)
        silent = await self._restore(urls, replace(self._how, patience_seconds=glance))
        for url in await self._restore(silent, self._how):
            self._lose(url, "it does not answer")
        if urls:
            for url in self._clients:
                await self._persist_again(url)
        return Outcome.MIXED if self._journal.changed() else Outcome.ROLLED_BACK

    async def _find_restarted(self) -> None:
        """Servers that were not asked, and serve what is given up all the same.

        One that restarts in the middle of a roll-out loads what a shared root names by then.
        """
        if not self._journal.changed():
            return
        for url, one in self._verified.items():
            if url in self._journal.records or one.there_already:
                continue
            try:
                status = await self._clients[url].status()
            except EnchTableError:
                continue  # it is told of at the end
            if one.goal.met_by(Served.of(status)):
                record = Record(
                    state="swapped",
                    before=one.served,
                    as_desired=one.status.as_desired,
                    goal=one.goal,
                    weight_version=status.weight_version,
                    server_name=self._clients[url].target.server_name,
                )
                self._note(url, record)
                self._tell("warning", url=url, reason="restarted meanwhile, with what is given up")

    async def _restore(self, urls: Sequence[str], how: How) -> list[str]:
        """Bring these back, as far as they answer; those that do not are returned."""

        async def restore(url: str) -> bool:
            record = self._journal.records[url]
            try:
                served = await bring_back(self._clients[url], record.before, record.goal, how)
            except Unreachable:
                return False
            except EnchTableError as error:
                self._lose(url, str(error))
            else:
                self._note(url, record.model_copy(update={"state": "restored", "reason": None}))
                self._tell("rolled_back", url=url, serves=_facts(served))
            return True

        answered: list[bool] = []
        for step in plan_steps(urls, canaries=0, at_once=self._pace.at_once):
            answered += await asyncio.gather(*map(restore, step))
        return [url for url, did in zip(urls, answered, strict=True) if not did]

    async def _persist_again(self, url: str) -> None:
        record, one = self._journal.records.get(url), self._verified.get(url)
        before = record.before if record is not None else one.served if one is not None else None
        was = record.as_desired if record is not None else one and one.status.as_desired
        if was is False or (record is not None and record.changed):
            return
        abandoned = (self._wish.safety_vector, self._wish.beta)
        try:
            await persist_again(self._clients[url], abandoned, before, self._how)
        except EnchTableError as error:
            reason = f"its vector root may still name '{abandoned[0]}', for restarts: {error}"
            self._tell("warning", url=url, reason=reason)

    def _lose(self, url: str, reason: str) -> None:
        update = {"state": "lost", "reason": reason}
        self._note(url, self._journal.records[url].model_copy(update=update))
        self._tell("not_rolled_back", url=url, reason=reason)

    def _note(self, url: str, record: Record) -> None:
        with suppress(ConfigError):  # a full disk must not keep servers from being brought back
            self._journal.set(url, record)

    async def _forget(self, gone: Sequence[str]) -> None:
        for url in gone:
            try:
                await self._clients[url].status()
            except Unreachable:
                self._tell("warning", url=url, reason="no longer named, does not answer: forgotten")
                self._journal.forget(url)
                del self._clients[url]
            except ServerRefused:
                continue

    async def _standing(self, client: Client) -> dict[str, object]:
        """Where one server stands at the end, by its own word."""
        url = client.target.url
        record = self._journal.records.get(url)
        state: State = "already" if url in self._already else "untouched"
        reason = None
        if record is not None:
            state = "lost" if record.state == "asked" else record.state
            reason = record.reason
        serves = None
        try:
            serves = _facts(Served.of(await client.status()))
        except EnchTableError as error:
            reason = reason or str(error)
        return {"url": url, "state": state, "serves": serves, "reason": reason}

    def _tell(self, kind: EventKind, **facts: object) -> None:
        with suppress(OSError):  # a terminal that went away must not keep a fleet half changed
            self._listener(Event(kind, facts))


def _facts(served: Served) -> dict[str, object]:
    return served.model_dump(mode="json")


def _code(error: EnchTableError) -> str:
    """A server's own, or one of ours."""
    if isinstance(error, ServerRefused):
        return error.code
    return "unreachable" if isinstance(error, Unreachable) else "not_as_asked"
