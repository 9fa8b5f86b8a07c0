"""What will be asked for, made before it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A thread that makes results in the order in which they will probably be asked for.

    Reading, hashing and adding cost as much as all the rest of a load. While vLLM makes its empty
    model, and while it copies one layer after the other, there is a core that has nothing to do.

    Args:
        make: Makes one result from its name; from any thread.
        sizes: Name → bytes of the result, in the order expected.
        budget_bytes: How much may lie ready. What does not fit waits until some has been taken;
            what is never asked for keeps its room.
    """

    def __init__(
        self, make: Callable[[str], T], sizes: Mapping[str, int], budget_bytes: int
    ) -> None:
        self._make = make
        self._sizes = dict(sizes)
        self._budget = budget_bytes
        self._changed = threading.Condition()
        self._ready: dict[str, T | Exception] = {}
        self._held_bytes = 0
        self._making: str | None = None
        self._taken: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="enchtable-ahead", daemon=True)
        self._thread.start()

    def take(self, name: str) -> T | None:
        """The result, once; None if it has not been this one's turn: make it yourself.

        Raises:
            Exception: Whatever making it raised.
        """
        with self._changed:
            self._taken.add(name)
            self._changed.wait_for(lambda: self._making != name)
            found = self._ready.pop(name, None)
            if found is not None:
                self._held_bytes -= self._sizes[name]
                self._changed.notify_all()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Stop, and drop what nobody took."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def _run(self) -> None:
        _use_every_core()
        for name, size in self._sizes.items():
            with self._changed:
                while not self._may_make(name, size):
                    self._changed.wait()
                if self._closed:
                    return
                if name in self._taken:
                    continue
                self._making = name
            made: T | Exception
            try:
                made = self._make(name)
            except Exception as error:  # whoever asks for this one is told
                made = error
            with self._changed:
                self._making = None
                self._ready[name] = made
                self._held_bytes += size
                self._changed.notify_all()
            del made

    def _may_make(self, name: str, size: int) -> bool:
        fits = self._held_bytes + size <= self._budget
        return self._closed or name in self._taken or fits


def _use_every_core() -> None:
    """Let this thread run where any thread of its process may.

    VLLM's CPU workers bind their main thread to one core, which a new thread inherits: it would
    take turns with the very one that it is to work beside.
    """
    cores: set[int] = set()
    with suppress(OSError, AttributeError):  # a thread has ended meanwhile; not Linux
        for thread in Path("/proc/self/task").iterdir():
            cores |= os.sched_getaffinity(int(thread.name))
        os.sched_setaffinity(0, cores)
