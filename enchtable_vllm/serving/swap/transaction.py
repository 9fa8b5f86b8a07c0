"""One swap over all ranks of all engines: everywhere, or nowhere.

    begin → stage → (all ready) → pause → commit → (all agree) → publish → resume → finish

Until ``pause`` nothing that is served has been touched. After it, any failure on any rank makes
every rank put its old tensors back; if even that fails, generation stays paused.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

from enchtable_vllm.plan.vector_root import VectorRoot
from enchtable_vllm.serving import compat, compat_swap
from enchtable_vllm.serving.swap.errors import SwapError
from enchtable_vllm.serving.swap.persist import Persistence
from enchtable_vllm.serving.swap.rank import LEASE_SECONDS, WORKER_METHOD
from enchtable_vllm.serving.swap.record import Record
from enchtable_vllm.serving.swap.request import RollbackRequest, SwapRequest
from enchtable_vllm.serving.swap.root import ask_root

_log = compat.logger("swap")

_POLL_SECONDS = 0.05
#: A pause that takes longer than this is given up: ``wait`` waits for every running request.
_PAUSE_SECONDS = 600.0
#: How often the ranks hear of a swap that has nothing else to tell them.
_KEEP_SECONDS = LEASE_SECONDS / 6
#: How often a rank is asked to release its lock.
_FINISH_TRIES = 3

#: What each rank of each engine answered.
Answers = list[dict[str, Any]]


class Transaction:
    """One swap, or one roll-back.

    Args:
        engines: All engines.
        request: What is asked for.
        root: The server's vector root, if it has one.
    """

    def __init__(
        self,
        engines: compat_swap.Engines,
        request: SwapRequest | RollbackRequest,
        root: VectorRoot | None,
    ) -> None:
        self._engines = engines
        self._request = request
        self._swap = request if isinstance(request, SwapRequest) else None
        self._owner = secrets.token_hex(16)
        self._began = time.perf_counter()
        self._before: dict[str, Any] = {}
        self._persistence = Persistence(root, self._swap)
        #: Between the first tensor that is exchanged and the word that all are.
        self._half_way = False
        self.record = Record("", self._swap.safety_vector if self._swap else "")

    async def run(self) -> dict[str, Any]:
        """Do it.

        Returns:
            The response's body.

        Raises:
            SwapError: It did not happen, and why; what is served is what was served before, but
                for the code ``failed``.
        """
        await self._begin()
        answer: dict[str, Any] | None = None
        try:
            async with self._lock_kept():
                answer = await self._run_locked()
            return answer
        except SwapError as error:
            self.record.code, self.record.reason = error.code, str(error)
            raise
        except BaseException as error:
            self.record.code, self.record.reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            self.record.swap_seconds = time.perf_counter() - self._began
            if answer is not None:
                answer["swap_seconds"] = self.record.swap_seconds
            await self._finish(answer)

    @asynccontextmanager
    async def _lock_kept(self) -> AsyncIterator[None]:
        """Let no rank believe that this swap is gone, however long a pause or a write takes."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(_KEEP_SECONDS)
                with suppress(Exception):  # what is wrong shows where something is asked for
                    await self._call("keep")

        keeping = asyncio.create_task(keep())
        try:
            yield
        finally:
            keeping.cancel()

    async def _begin(self) -> None:
        await ask_root(self._persistence.refuse_unwritable)
        started = {"owner": self._owner, "expected_epoch": self._request.expected_epoch}
        refusal = await self._take_lock(started)
        if refusal and refusal["code"] == "interrupted":
            await self._recover(refusal["owner"])
            refusal = await self._take_lock(started)
        if refusal:
            await self._call("finish", record=None)  # where it was taken
            raise SwapError.of(refusal)
        self._before = await first_status(self._engines)
        self.record.source = self._before["active"]["safety_vector"]
        if self._swap is None:
            self.record.target = self._before["rolls_back_to"] or ""

    async def _take_lock(self, started: dict[str, Any]) -> dict[str, Any] | None:
        """What refuses, if anything does."""
        taken = await self._engines.call_in_turn(
            WORKER_METHOD,
            "begin",
            started,
            until=lambda ranks: not all(answer["ok"] for answer in ranks),
        )
        return next((answer for answer in _flat(taken) if not answer["ok"]), None)

    async def _recover(self, owner: str) -> None:
        """Bring a swap to its end whose API server died, or that failed to go back."""
        _log.warning("a swap was cut off half-way: every rank goes back first")
        mine, self._owner = self._owner, owner
        try:
            polled = [rank for rank in await self._call("poll") if not _lost_lock(rank)]
            # Else it was done, but for its end.
            if not all(rank.get("published") for rank in polled):
                restored = await self._call("restore")
                held = [rank for rank in restored if not _lost_lock(rank)]
                _check_put_in(held, polled[0].get("old_digest"))
            status = await first_status(self._engines)
            await self._engines.set_version(status["weight_version"])
            await self._engines.resume()
            await self._call("finish", record=None)
        except Exception as error:
            raise SwapError(
                "failed",
                f"an earlier swap was cut off, and going back failed: {error}",
                "Restart this server; it serves nothing until then.",
            ) from error
        finally:
            self._owner = mine

    async def _run_locked(self) -> dict[str, Any]:
        polled = await self._stage()
        # One that lists no name is told by what was staged.
        self.record.target = polled["active"]["safety_vector"]
        result = {
            "outcome": "swapped" if self._swap else "rolled_back",
            "from": self.record.source,
            "to": self.record.target,
            "weight_version": polled["weight_version"],
            "staging_seconds": self.record.staging_seconds,
            "pausing_seconds": 0.0,
            "paused_seconds": 0.0,
            "staged_bytes": self.record.staged_bytes,
            "persisted": False,
            "warnings": polled["warnings"],
            "active": polled["active"],
        }
        if self._swap and self._swap.dry_run:
            self.record.outcome = "dry_run"
            return result | {"outcome": "dry_run"}
        if polled["same"]:
            result["persisted"] = await self._persist()
            self.record.outcome, self.record.phase = "unchanged", "done"
            return result | {"outcome": "unchanged"}
        paused_at = await self._pause()
        try:
            self.record.phase = "commit"
            self._half_way = True
            committed = await self._call("commit")
            if all(map(_lost_lock, committed)):
                self._half_way = False
                raise _LockLost
            _check_put_in(committed, polled["new_digest"])
            self.record.phase = "publish"
            result["persisted"] = await self._persist()
            await self._engines.set_version(polled["weight_version"])
            persisted = self._persistence.overwritten if self._swap else None
            _refuse(await self._call("publish", persisted_before=persisted))
        except _LockLost as error:
            await self._resume(paused_at)
            raise SwapError(
                "lost_lock",
                "this swap: expected to be heard of, got no sign of life for so long that its "
                "lock was given to another",
                "Nothing was put in. Look for what kept the API server busy, and try again.",
            ) from error
        except Exception as failure:
            await self._undo(failure, polled["old_digest"], paused_at)
        self._half_way = False
        await self._resume(paused_at)
        self.record.outcome, self.record.phase = str(result["outcome"]), "done"
        return result | {
            "pausing_seconds": self.record.pausing_seconds,
            "paused_seconds": self.record.paused_seconds,
        }

    async def _persist(self) -> bool:
        before = self._before["persisted_before"]
        return await ask_root(self._persistence.write, self.record.source, before)

    async def _stage(self) -> dict[str, Any]:
        """What every rank is ready to put in, as the first tells it."""
        self.record.phase = "stage"
        swap = self._swap
        asked = {
            "safety_vector": swap.safety_vector if swap else None,
            "beta": swap.beta if swap else None,
            "engines": self._engines.on_this_machine,
        }
        _refuse(await self._call("stage", **asked))
        deadline = time.monotonic() + self._request.timeout_seconds
        while True:
            ranks = await self._call("poll")
            _refuse(ranks)
            if all(rank["staged"] for rank in ranks):
                break
            if time.monotonic() > deadline:
                raise SwapError(
                    "timeout",
                    f"staging: expected every rank to be ready in "
                    f"{self._request.timeout_seconds:g} s, got "
                    f"{sum(rank['staged'] for rank in ranks)} of {len(ranks)}",
                    "Nothing was changed. Raise 'timeout_seconds', or make the plan ahead.",
                )
            await asyncio.sleep(_POLL_SECONDS)
        self.record.staging_seconds = max(rank["staging_seconds"] for rank in ranks)
        self.record.staged_bytes = sum(rank["staged_bytes"] for rank in ranks)
        for what in ("identity", "old_digest", "new_digest"):
            if any(rank[what] != ranks[0][what] for rank in ranks):
                raise SwapError(
                    "refused",
                    f"ranks: expected one {what} on all, got {[rank[what] for rank in ranks]}",
                    "Nothing was changed. Give every machine the same files.",
                    "MismatchError",
                )
        return ranks[0]

    async def _pause(self) -> float:
        self.record.phase = "pause"
        if await self._engines.is_paused():
            raise SwapError(
                "paused_by_another",
                "generation: expected it to be running, got one that is paused already",
                "Nothing was changed. Resume it first, by whatever paused it.",
            )
        _refuse(await self._call("keep"))
        asked_at = time.perf_counter()
        try:
            await asyncio.wait_for(self._engines.pause(self._request.pause), _PAUSE_SECONDS)
        except BaseException as error:
            await self._resume(time.perf_counter())
            if not isinstance(error, TimeoutError):
                raise
            raise SwapError(
                "timeout",
                f"pause '{self._request.pause}': expected running requests to end in "
                f"{_PAUSE_SECONDS:g} s, got some that did not",
                "Nothing was changed. Use 'keep', or 'abort'.",
            ) from error
        finally:
            paused_at = time.perf_counter()
            self.record.pausing_seconds = paused_at - asked_at
        return paused_at

    async def _undo(self, failure: Exception, old_digest: str, paused_at: float) -> None:
        """Every rank back to its old tensors; raises whatever comes of it."""
        _log.error("swap failed (%s); every rank goes back", failure)
        try:
            try:
                _check_put_in(await self._call("restore"), old_digest)
                await self._engines.set_version(self._before["weight_version"])
            finally:  # else a restart, or a swap that begins by going back, would find it
                await ask_root(self._persistence.undo)
            self._half_way = False
        except Exception as error:
            await self._give_up(
                f"a rank failed to commit ({failure}), and going back failed too ({error})",
                paused_at,
                error,
            )
        await self._resume(paused_at)
        self.record.outcome = "undone"
        raise SwapError(
            "undone",
            f"{failure}. Every rank is back on '{self.record.source}', and generation goes on",
            "See the server's log for the cause, and try again.",
        )

    async def _resume(self, paused_at: float) -> None:
        try:
            await self._engines.resume()
        except Exception as error:
            await self._give_up(f"generation could not be resumed ({error})", paused_at, error)
        self.record.paused_seconds = time.perf_counter() - paused_at

    async def _give_up(self, reason: str, paused_at: float, error: Exception) -> NoReturn:
        """Leave generation paused, and say so: readiness is 503 until a swap brings it back."""
        self.record.outcome = "failed"
        self.record.paused_seconds = time.perf_counter() - paused_at
        reason = f"{reason}: generation stays paused"
        for number, rank in enumerate(await self._call("give_up", reason=reason)):
            if not rank["ok"]:
                _log.error("rank %d: %s", number, rank["error"]["message"])
        raise SwapError("failed", reason, "Restart this server, or swap again.") from error

    async def _finish(self, answer: dict[str, Any] | None) -> None:
        """Release the lock; after a failure that stays, or half-way, the next swap takes it."""
        if self.record.outcome == "failed" or self._half_way:
            return
        try:
            for _ in range(_FINISH_TRIES):
                ranks = await self._call("finish", record=self.record.to_json())
                if answer is not None and ranks[0]["ok"]:
                    answer["epoch"] = ranks[0]["epoch"]
                if all(rank["ok"] or _lost_lock(rank) for rank in ranks):
                    return
            _log.error("a rank did not release its lock; the next swap after a while does it")
        except Exception:
            if not self._engines.dead:
                raise
            _log.exception("the engine died at the end of a swap")

    async def _call(self, command: str, **arguments: Any) -> Answers:
        told = {"owner": self._owner, **arguments}
        return _flat(await self._engines.call(WORKER_METHOD, command, told))


class _CommitFailed(Exception):
    """A rank does not hold what it was told to hold."""


class _LockLost(Exception):
    """No rank knows this swap any more, and none has put anything in."""


async def first_status(engines: compat_swap.Engines) -> dict[str, Any]:
    """In detail, of the first rank of the first engine."""
    status = _flat(await engines.call(WORKER_METHOD, "status", {"detail": True}))[0]
    if not status["ok"]:
        raise SwapError.of(status)
    return status


def _check_put_in(ranks: Answers, digest: str | None) -> None:
    """All ranks say that they hold these bytes, or the transaction has failed."""
    for number, rank in enumerate(ranks):
        if not rank["ok"]:
            raise _CommitFailed(f"rank {number}: {rank['error']['message']}")
        if rank["digest"] != digest:
            raise _CommitFailed(f"rank {number}: expected {digest}, got {rank['digest']}")


def _lost_lock(rank: dict[str, Any]) -> bool:
    """Whether a rank does not know the swap, or has finished it."""
    return not rank["ok"] and rank["code"] == "lost_lock"


def _flat(answers: list[list[dict[str, Any]]]) -> Answers:
    return [rank for engine in answers for rank in engine]


def _refuse(ranks: Answers) -> None:
    """Raise what the first rank that refuses says; none has touched anything yet."""
    for rank in ranks:
        if not rank["ok"]:
            raise SwapError.of(rank)
