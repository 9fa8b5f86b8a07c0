"""What a roll-out has done so far, so that neither a crash nor a lost terminal loses it.

One file, replaced atomically: before a server is asked to swap (the intent, with what it serves
until then), and after. What a line says is where to look, not what is true: on resuming, every
server is asked what it serves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from blake3 import blake3
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from enchtable_vllm.envs import cache_folder
from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet.documents import Goal, Served
from enchtable_vllm.fleet.events import Outcome


class Request(BaseModel):
    """What makes two roll-outs the same one: how it goes about it does not.

    Attributes:
        targets: As they were named; a ``dns://`` name may resolve to others next time.
        safety_vector: The vector.
        beta: Another β than the plan's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...]
    safety_vector: str
    beta: float | None = None

    @property
    def in_one_order(self) -> Request:
        """The same servers are the same, in whatever order they are named and changed."""
        return self.model_copy(update={"targets": tuple(sorted(self.targets))})

    def state_file(self) -> Path:
        """Where its journal is, unless told otherwise."""
        digest = blake3(self.in_one_order.model_dump_json().encode()).hexdigest()[:32]
        return cache_folder() / "rollouts" / f"{digest}.json"


class Record(BaseModel):
    """One server.

    Attributes:
        state: ``asked``: to swap, and its answer is not known; ``swapped``; ``restored``: it
            serves what it did before; ``lost``: it could not be made to.
        before: What it served.
        as_desired: Whether its vector root named that too.
        goal: What it was asked for.
        weight_version: What it then served, by its own name.
        server_name: Of its certificate.
        reason: Why it is lost.
    """

    model_config = ConfigDict(extra="forbid")

    state: Literal["asked", "swapped", "restored", "lost"]
    before: Served
    as_desired: bool | None = None
    goal: Goal
    weight_version: str = ""
    server_name: str | None = None
    reason: str | None = None

    @property
    def changed(self) -> bool:
        """Whether it is, or may be, not what it was."""
        return self.state != "restored"


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    request: Request
    going: Literal["forward", "back"] = "forward"
    reason: str | None = None
    outcome: Outcome | None = None
    targets: dict[str, Record] = Field(default_factory=dict)


class Journal:
    """Use as a context manager: an exclusive lock is held inside.

    Args:
        path: The file.
        request: What it must be the journal of.

    Attributes:
        resumed: An unfinished roll-out of the same request was found, and is continued.
        records: By URL, in the order in which servers were asked.

    Raises:
        ConfigError: On entering: another process is at it; the file belongs to another request,
            is damaged, or cannot be written.
    """

    def __init__(self, path: Path, request: Request) -> None:
        self.path = path
        self.resumed = False
        self._content = _Content(request=request)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise self._unusable("no other process at the same roll-out", "one that is") from error
        except OSError as error:
            raise self._unusable("a place that can be written to", error) from error
        try:
            self._take_over()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    @property
    def records(self) -> dict[str, Record]:
        """By URL."""
        return self._content.targets

    @property
    def going_back(self) -> str | None:
        """Why what was changed is being rolled back; None while it is not."""
        return self._content.reason if self._content.going == "back" else None

    def changed(self) -> Sequence[str]:
        """URLs of what is, or may be, changed; the first one first."""
        return [url for url, record in self.records.items() if record.changed]

    def set(self, url: str, record: Record) -> None:
        """Write down what is about to happen to a server, or what did.

        Raises:
            ConfigError: It cannot be written.
        """
        if record.state == "asked":
            self.records.pop(url, None)  # the order is that of asking
        self.records[url] = record
        self._write()

    def forget(self, url: str) -> None:
        """A server that is there no longer."""
        del self.records[url]
        self._write()

    def turn_back(self, reason: str) -> None:
        """From here on everything is rolled back, whatever interrupts it."""
        self._content.going, self._content.reason = "back", reason
        self._write()

    def finish(self, outcome: Outcome) -> None:
        """The end: a next run continues unless all is done, or all is as it was."""
        self._content.outcome = outcome
        self._write()

    def _take_over(self) -> None:
        try:
            stored = self.path.read_bytes()
        except FileNotFoundError:
            return
        try:
            found = _Content.model_validate_json(stored)
        except ValidationError as error:
            raise self._unusable("the journal of a roll-out", "something else") from error
        if found.request.in_one_order != self._content.request.in_one_order:
            raise self._unusable("the journal of this roll-out", "that of another one")
        if found.outcome not in (Outcome.DONE, Outcome.ROLLED_BACK):
            self._content, self.resumed = found, bool(found.targets)
            self._content.outcome = None

    def _write(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(self._content.model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            raise self._unusable("room and permission to write", error) from error

    def _unusable(self, expected: str, got: object) -> ConfigError:
        return ConfigError(
            f"state file '{self.path}'",
            expected=expected,
            got=got,
            fix="Choose another one with --state, or see what that one is about.",
        )
