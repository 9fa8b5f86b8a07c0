"""What an API server knows of its engines' vectors, and the one place that changes them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, Protocol

from enchtable_vllm.checkpoint import local
from enchtable_vllm.errors import EnchTableError
from enchtable_vllm.plan.vector_root import VectorRoot
from enchtable_vllm.serving import compat, compat_swap
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.spans import span
from enchtable_vllm.serving.swap.describe import describe_error
from enchtable_vllm.serving.swap.errors import SwapError
from enchtable_vllm.serving.swap.rank import WORKER_METHOD
from enchtable_vllm.serving.swap.request import RollbackRequest, SwapRequest
from enchtable_vllm.serving.swap.root import Desired, ask_root
from enchtable_vllm.serving.swap.transaction import Transaction
from enchtable_vllm.signing import open_signed

_log = compat.logger("swap")

#: A readiness probe needs no token: however often it is asked, the engine is asked once a second.
_READY_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
#: Errors that are a vector's, or a plan's, and no request's.
_NOT_AS_THEY_SHOULD_BE = (
    "SafetyVectorError",
    "NonFiniteError",
    "MismatchError",
    "SignatureError",
)
#: How often the root's ``current.json`` and the other API servers' swaps are looked for.
_WATCH_SECONDS = 5.0
#: Of a vector in the list: what is null until it has been read.
_UNREAD = dict.fromkeys(("digest", "scope", "tensors", "signed_by", "fault"))


class Observer(Protocol):
    """Who is told what happens: metrics."""

    def serving(self, status: dict[str, Any]) -> None:
        """What is served now, as ``GET /v1/enchtable/status`` tells it."""

    def silent(self) -> None:
        """The ranks do not answer."""

    def swapped(self, record: dict[str, Any]) -> None:
        """A swap has ended, one way or the other."""

    def verification_failed(self, kind: str) -> None:
        """Something's bytes were not what they should be."""


class SwapService:
    """Status, swaps and readiness of one server.

    Args:
        engines: All engines behind this API server.
        config: The loader's.
        observer: Who is told.
    """

    def __init__(
        self, engines: compat_swap.Engines, config: LoaderConfig, observer: Observer
    ) -> None:
        self._engines = engines
        self._observer = observer
        self._root_path = config.vector_root
        self._desired = Desired(config.vector_root)
        self._allowed = config.allowed_repositories
        self._required = config.require_signature
        self._plans_itself = config.base_model is not None
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._ready: tuple[float, bool, str | None] = (-_READY_SECONDS, False, None)
        self._asking = asyncio.Lock()
        self._version = ""

    async def start(self) -> None:
        """Name the weights, tell what is served, and keep looking.

        Raises:
            SwapError: The ranks do not answer; or engines loaded different vectors, which no swap
                could bring together: what one of them is to go back to is not what another is.
        """
        status = await self.status()
        if status["disagreeing"] and status["state"] == "serving":
            found = [rank["weight_version"] for one in status["engines"] for rank in one["ranks"]]
            raise SwapError(
                "refused",
                f"engines of one server: expected the same vector on each, got {found}",
                "The root's current.json changed while they loaded: start the server again.",
                "MismatchError",
            )
        await self._engines.set_version(status["weight_version"])
        self._watcher = asyncio.create_task(self._watch())

    async def status(self) -> dict[str, Any]:
        """See docs/http-api.md.

        Raises:
            SwapError: The ranks do not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answers = await self._ask_status()
                paused = await self._engines.is_paused()
                if paused:  # by a swap that began, or ended, meanwhile?
                    before, answers = answers, await self._ask_status()
                    paused = not _swap_between(before, answers)
        except TimeoutError as error:
            raise SwapError(
                "not_ready",
                f"engine: expected an answer in {_ANSWER_SECONDS:g} s, got none",
                "It is busy or stuck: ask again, and restart it if that lasts.",
            ) from error
        status = self._combined(answers, paused, await self._desired.seen())
        self._version = status["weight_version"]
        self._observer.serving(status)
        for engine in status["engines"]:
            for rank in engine["ranks"]:
                rank.pop("modules", None)
        status.pop("modules")
        return status

    async def ready(self) -> tuple[bool, str | None]:
        """Whether every rank serves what it should, and if not, why. Cheap to ask."""
        async with self._asking:
            asked, ready, reason = self._ready
            if time.monotonic() - asked >= _READY_SECONDS:
                try:
                    status = await self.status()
                    ready, reason = status["ready"], status["reason"]
                except Exception as error:
                    self._observer.silent()
                    ready, reason = False, f"{type(error).__name__}: {error}"
                self._ready = (time.monotonic(), ready, reason)
            return ready, reason

    async def vectors(self) -> list[dict[str, Any]]:
        """What may be swapped in."""
        status = await self.status()
        return await asyncio.to_thread(self._vectors, status)

    async def change(self, request: SwapRequest | RollbackRequest) -> dict[str, Any]:
        """Swap, or roll back. A caller that goes away does not stop it.

        Raises:
            SwapError: It did not happen, and why.
        """
        task = asyncio.create_task(self._change(request))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def probe(self) -> dict[str, Any]:
        """Digests of the weights that the ranks really compute with."""
        answers = await self._engines.call(WORKER_METHOD, "probe", {})
        for rank in (rank for engine in answers for rank in engine):
            if not rank["ok"]:
                raise SwapError.of(rank)
        return {"engines": [[rank["digest"] for rank in engine] for engine in answers]}

    async def _change(self, request: SwapRequest | RollbackRequest) -> dict[str, Any]:
        transaction = Transaction(self._engines, request, await ask_root(self._root))
        try:
            with span("enchtable.swap") as found:
                try:
                    answer = await transaction.run()
                finally:
                    found |= transaction.record.to_json()
                    if transaction.record.source:  # it had the lock
                        await self._refresh()
        except SwapError as error:
            self._tell(error, transaction)
            raise
        except Exception as error:
            _log.exception("swap: an error that is no refusal")
            failure = SwapError(
                "not_ready" if self._engines.dead else "refused",
                f"{type(error).__name__}: {error}",
                "See the server's log.",
            )
            self._tell(failure, transaction)
            raise failure from error
        self._observer.swapped(transaction.record.to_json())
        _log.info(
            "safety vector %s: '%s' -> '%s' (%s), staged %.2f s, paused %.3f s",
            answer["outcome"],
            answer["from"],
            answer["to"],
            answer["weight_version"],
            answer["staging_seconds"],
            answer["paused_seconds"],
        )
        return answer

    def _tell(self, error: SwapError, transaction: Transaction) -> None:
        _log.warning("swap not done (%s): %s", error.code, error.message)
        if error.kind in _NOT_AS_THEY_SHOULD_BE:
            self._observer.verification_failed(error.kind)
        if error.code not in ("swap_in_progress", "wrong_epoch"):
            self._observer.swapped(transaction.record.to_json())

    async def _refresh(self) -> None:
        """What is served may have changed."""
        self._ready = (-_READY_SECONDS, False, None)
        try:
            await self.status()
        except Exception as error:
            _log.warning("status after a swap: %s", error)

    async def _watch(self) -> None:
        """See swaps of other API servers, changes of ``current.json``, and what ails the ranks.

        An API server that started while another one swapped may have named the weights after
        what they were before.
        """
        while not self._engines.dead:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                await self.ready()  # metrics tell what it finds, or that nobody answers
                async with asyncio.timeout(_ANSWER_SECONDS):
                    version = await self._engines.version()
                    if version != self._version and not self._running:
                        status = await self.status()
                        if status["state"] == "serving":
                            await self._engines.set_version(status["weight_version"])
            except Exception as error:  # the engine may be on its way down
                _log.debug("watching: %s", error)

    def _root(self) -> VectorRoot | None:
        try:
            return None if self._root_path is None else VectorRoot(self._root_path)
        except EnchTableError as error:
            raise SwapError.of(describe_error(error)) from error

    async def _ask_status(self) -> list[list[dict[str, Any]]]:
        return await self._engines.call(WORKER_METHOD, "status", {"detail": True})

    def _combined(
        self, answers: list[list[dict[str, Any]]], paused: bool, desired: dict[str, Any] | None
    ) -> dict[str, Any]:
        """One server's status of all ranks'; ``paused``: by something that is no swap."""
        ranks = [rank for engine in answers for rank in engine]
        for rank in ranks:
            if not rank["ok"]:
                raise SwapError.of(rank)
        first = ranks[0]
        versions = Counter(repr(rank["identity"]) for rank in ranks)
        disagreeing = len(ranks) - max(versions.values())
        broken = next((rank["broken"] for rank in ranks if rank["broken"]), None)
        reason = broken
        swapping = any(rank["swapping"] for rank in ranks)
        if disagreeing and not swapping:  # else one engine was asked before it published
            reason = f"{disagreeing} of {len(ranks)} ranks serve another vector"
        if paused and reason is None:
            reason = "generation is paused, and by no swap: whatever paused it must resume it"
        active = first["active"]
        return {
            "state": "failed" if broken else "swapping" if swapping else "serving",
            "ready": reason is None,
            "reason": reason,
            "weight_version": first["weight_version"],
            "epoch": first["epoch"],
            "task_model": first["task_model"],
            "active": active,
            "modules": first["modules"],
            "desired": desired,
            "as_desired": None if desired is None else _is_as_desired(active, desired),
            "not_swappable": first["not_swappable"],
            "rolls_back_to": first["rolls_back_to"],
            "swaps": first["swaps"],
            "disagreeing": disagreeing,
            "engines": [
                {"engine": number, "ranks": [_of_rank(rank) for rank in engine]}
                for number, engine in enumerate(answers)
            ],
        }

    def _vectors(self, status: dict[str, Any]) -> list[dict[str, Any]]:
        root, fingerprint = self._root(), status["task_model"]["fingerprint"]
        found = []
        for name in root.names() if root else ():
            entry: dict[str, Any] = {"name": name, **_UNREAD, "planned": False}
            try:
                assert root is not None
                vector, signature = open_signed(local(root.folder(name)), self._required)
                entry["signed_by"] = signature and signature.signed_by
                entry["digest"] = vector.fingerprint
                entry["scope"] = vector.manifest.scope
                entry["tensors"] = len(vector.tensors)
                planned = root.plan(name, fingerprint) is not None
                entry["planned"] = planned or self._plans_itself
            except EnchTableError as error:
                entry["fault"] = str(error)
            entry["active"] = name == status["active"]["safety_vector"]
            found.append(entry)
        for name in self._allowed:
            active = name == status["active"]["safety_vector"]
            found.append({"name": name, **_UNREAD, "planned": None, "active": active})
        return found


def _swap_between(before: list[list[dict[str, Any]]], after: list[list[dict[str, Any]]]) -> bool:
    """Whether a swap was going on, or came and went, between two answers of all ranks."""
    earlier, later = (
        [rank for engine in answers for rank in engine if rank["ok"]] for answers in (before, after)
    )
    return any(rank["swapping"] for rank in earlier + later) or (
        [rank["swaps"] for rank in earlier] != [rank["swaps"] for rank in later]
    )


def _of_rank(rank: dict[str, Any]) -> dict[str, Any]:
    kept = ("rank", "epoch", "weight_version", "swapping", "staged_bytes", "broken")
    found: dict[str, Any] = {key: rank[key] for key in kept} | rank["identity"]
    found |= {key: rank["active"].get(key) for key in ("merged", "filtered", "merged_digest")}
    return found


def _is_as_desired(active: dict[str, Any], desired: dict[str, Any]) -> bool:
    """Name and β; where the root names none, the plan's own."""
    beta = active["plan_beta"] if desired["beta"] is None else desired["beta"]
    return (active["safety_vector"], active["beta"]) == (desired["safety_vector"], beta)
