"""The root's ``current.json``, as part of a swap: written with it, and undone with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from enchtable_vllm.errors import EnchTableError
from enchtable_vllm.plan.vector_root import CURRENT, CurrentVector, VectorRoot
from enchtable_vllm.serving import compat
from enchtable_vllm.serving.swap.describe import describe_error
from enchtable_vllm.serving.swap.errors import SwapError
from enchtable_vllm.serving.swap.request import SwapRequest

_log = compat.logger("swap")

#: Several servers may share a root; the file is written by one at a time.
_TRIES = 5

#: ``{"was": …}``: what the file said before; ``was`` is None where there was none.
Before = dict[str, Any]


class Persistence:
    """What one swap, or one roll-back, does to ``current.json``.

    Args:
        root: The server's vector root, if it has one.
        swap: What is asked for; None: a roll-back.

    Attributes:
        overwritten: What the file said before it was written; None: it was not.
    """

    def __init__(self, root: VectorRoot | None, swap: SwapRequest | None) -> None:
        self._root = root
        self._swap = swap
        self.overwritten: Before | None = None

    def refuse_unwritable(self) -> None:
        """Before anything else: can it be written, if it must be?

        Raises:
            SwapError: It cannot.
        """
        if self._swap is None or not self._swap.persist:
            return
        if self._root is None:
            raise SwapError(
                "invalid_request",
                "'persist': expected a server with a 'vector_root', got none",
                "Start it with one, or leave 'persist' out.",
            )
        try:
            self._root.refuse_read_only()
        except EnchTableError as error:
            raise SwapError.of(describe_error(error)) from error

    def write(self, source: str, swap_wrote: Before | None) -> bool:
        """Make the file say what is served now.

        Args:
            source: The name of what was served until now.
            swap_wrote: For a roll-back: what the swap that it undoes overwrote, if it did.

        Returns:
            Whether it was written.

        Raises:
            EnchTableError: It cannot be.
        """
        root, swap = self._root, self._swap
        if root is None:
            return False
        before = _current_or_none(root)
        if swap is not None:
            if not swap.persist or swap.safety_vector == CURRENT:
                return False
            _retried(lambda: root.set_current(swap.safety_vector, swap.beta))
            self.overwritten = {"was": before.model_dump() if before else None}
            return True
        if swap_wrote is None:
            return False
        if before is None or before.safety_vector != source:
            _log.warning("current.json names another vector by now: it is left as it is")
            return False
        self._write_back(swap_wrote)
        self.overwritten = {"was": before.model_dump()}
        return True

    def undo(self) -> None:
        """Make the file say again what it said before `write`."""
        if self.overwritten is not None:
            self._write_back(self.overwritten)

    def _write_back(self, before: Before) -> None:
        assert self._root is not None
        root, was = self._root, before["was"]
        if was is None:
            root.clear_current()
        else:
            _retried(lambda: root.set_current(was["safety_vector"], was["beta"]))


def _current_or_none(root: VectorRoot) -> CurrentVector | None:
    try:
        return root.current()
    except EnchTableError:
        return None


def _retried(write: Callable[[], Any]) -> None:
    for last in (False,) * (_TRIES - 1) + (True,):
        try:
            write()
            return
        except EnchTableError:
            if last:
                raise
            time.sleep(0.05)
