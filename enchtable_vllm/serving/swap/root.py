"""The vector root, asked from an event loop: a file system that hangs keeps nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from enchtable_vllm.errors import EnchTableError
from enchtable_vllm.plan.vector_root import VectorRoot
from enchtable_vllm.serving import compat
from enchtable_vllm.serving.swap.errors import SwapError

_log = compat.logger("swap")

#: How long a swap waits for it.
_ASK_SECONDS = 30.0
#: How long a status does: readiness probes may give up after a second.
_LOOK_SECONDS = 0.5

Answer = TypeVar("Answer")


async def ask_root(ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a function that looks into the root returns, from a thread.

    Raises:
        SwapError: The root does not answer.
    """
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            return await asyncio.to_thread(ask, *arguments)
    except TimeoutError as error:
        raise SwapError(
            "refused",
            f"vector root: expected an answer in {_ASK_SECONDS:g} s, got none",
            "See whether its file system hangs.",
        ) from error


class Desired:
    """What the root's ``current.json`` names.

    Args:
        path: The root; None: there is none.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = path
        #: One at a time: a root that hangs keeps one thread, however often it is asked for.
        self._look: asyncio.Future[dict[str, Any] | None] | None = None

    async def seen(self) -> dict[str, Any] | None:
        """What it names now; None: nothing, or the root does not say."""
        if self._path is None:
            return None
        if self._look is None:
            self._look = asyncio.ensure_future(asyncio.to_thread(self._read))
        look = self._look
        await asyncio.wait({look}, timeout=_LOOK_SECONDS)
        if not look.done():
            _log.warning("vector root '%s' does not answer", self._path)
            return None
        self._look = None
        return look.result()

    def _read(self) -> dict[str, Any] | None:
        assert self._path is not None
        try:
            current = VectorRoot(self._path).current()
        except EnchTableError as error:
            _log.warning("%s", error)
            return None
        if current is None:
            return None
        return current.model_dump(include={"safety_vector", "beta", "version"})
