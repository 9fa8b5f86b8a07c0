"""What will be asked for, made before it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from enchtable_vllm.merge.cores import use_every_core

T = TypeVar("T")


class Ahead(Generic[T]):
    """Threads that make results in the order in which they will probably be asked for.

    On a core that has nothing to do, they are made beside all else. While vLLM copies one layer
    after the other there may be no such core: then whoever works beside it only slows it down,
    since each of its copies waits for the thread that was held up. There the results are made in
    turns with the copies, by all threads, the asking one too; and not while vLLM makes its empty
    model, which runs Python all the time and loses more than is won.

    Args:
        make: Makes one result from its name; from any thread.
        sizes: Name → bytes of the result, in the order expected.
        budget_bytes: How much may lie ready. What does not fit waits until some has been taken;
            what is never asked for keeps its room.
        threads: How many, besides the one that asks.
        beside: Whether they work all the time, or only within a `fill`.
    """

    def __init__(
        self,
        make: Callable[[str], T],
        sizes: Mapping[str, int],
        budget_bytes: int,
        *,
        threads: int = 1,
        beside: bool = True,
    ) -> None:
        self._make = make
        self._sizes = sizes
        self._budget = budget_bytes
        self._beside = beside
        self._changed = threading.Condition()
        self._todo = dict.fromkeys(sizes)  # in order, and quick to take one out of
        self._making: set[str] = set()
        self._ready: dict[str, T | Exception] = {}
        self._held_bytes = 0
        self._at_work = beside
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"enchtable-ahead-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def fill(self) -> None:
        """Work too, until all lies ready that may; nothing where threads go on by themselves."""
        if self._beside:
            return
        with self._changed:
            self._at_work = True
            self._changed.notify_all()
        while (name := self._claim()) is not None:
            self._make_one(name)
        with self._changed:
            self._changed.wait_for(lambda: not self._making)
            self._at_work = False

    def take(self, name: str) -> T | None:
        """The result, once; None if it has not been this one's turn: make it yourself.

        Raises:
            Exception: Whatever making it raised.
        """
        if name in self._todo:
            self.fill()
        with self._changed:
            self._todo.pop(name, None)
            self._changed.wait_for(lambda: name not in self._making)
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
        for thread in self._threads:
            thread.join()
        self._ready.clear()

    def _run(self) -> None:
        use_every_core()
        while True:
            with self._changed:
                while not self._at_work or (name := self._claim()) is None:
                    if self._closed or not self._todo:
                        return
                    self._changed.wait()
            self._make_one(name)

    def _claim(self) -> str | None:
        """The next to make, its room taken; None if there is none, or no room."""
        with self._changed:
            name = next(iter(self._todo), None)
            if self._closed or name is None:
                return None
            if self._held_bytes + self._sizes[name] > self._budget:
                return None
            del self._todo[name]
            self._making.add(name)
            self._held_bytes += self._sizes[name]
            return name

    def _make_one(self, name: str) -> None:
        made: T | Exception
        try:
            made = self._make(name)
        except Exception as error:  # whoever asks for this one is told
            made = error
        with self._changed:
            self._making.remove(name)
            self._ready[name] = made
            self._changed.notify_all()
