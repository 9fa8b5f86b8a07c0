"""What a plan in the making has found so far, so that an interruption costs one matrix.

A file beside the plan to be: a line for each finished tensor, with a digest of its own, so that
a line torn by a crash is dropped. The first line names what the rest belongs to. On resuming,
every tensor is still read and digested, which is cheap; only the linear algebra is saved, and
only where task, base and delta are the very bytes that it was done for.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3
from pydantic import TypeAdapter, ValidationError

from enchtable_vllm.errors import ConfigError, EnchTableError
from enchtable_vllm.vector.factors import Rung


@dataclass(frozen=True)
class Terms:
    """Of one merged tensor, before the norm scale is known.

    Attributes:
        safety_norm: ‖S‖ of this delta.
        a, b: interference = a·n + b, for each matrix.
        rungs: The task's and the safety delta's, for each matrix.
    """

    safety_norm: float
    a: tuple[float, ...]
    b: tuple[float, ...]
    rungs: tuple[tuple[Rung, Rung], ...]


@dataclass(frozen=True)
class _Line:
    """A finished tensor: the digests of what went in (task, base, delta), what came of it.

    ``seconds``: the work took; 0 in the files of versions that did not say.
    """

    name: str
    digests: tuple[str, str, str]
    terms: Terms
    seconds: float = 0.0


_LINE = TypeAdapter(_Line)


class Journal:
    """Use as a context manager: an exclusive lock is held inside.

    Args:
        path: The file; made if it is missing, continued if it belongs to the same inputs.
        resume: False: begin anew whatever is there.
        announce: Called with how many matrices were done and how many there are, if any was.

    Attributes:
        seconds: Of each finished tensor: what its work took, in whichever run it was done.

    Raises:
        ConfigError: On entering: another process is planning to the same place.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume: bool = True,
        announce: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path = path
        self._resume = resume
        self._announce = announce
        self.seconds: dict[str, float] = {}
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._file = self.path.open("a+b", buffering=0)  # a line is one write
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(
                f"'{self.path}'",
                expected="no other process planning to the same place",
                got="one that is",
                fix="Wait for it, or write this plan elsewhere.",
            ) from error
        except OSError:  # a file system without locks
            pass
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Keep the file if the work was interrupted; remove it if it is done or refused."""
        if kind is None or issubclass(kind, EnchTableError):
            self.path.unlink(missing_ok=True)
        self._file.close()

    def begin(self, inputs: Sequence[str], matrices: int) -> None:
        """Take over what was done for the same inputs; forget all else.

        Args:
            inputs: Whatever decides the numbers.
            matrices: How many there are, for the announcement.
        """
        head = _signed(json.dumps(inputs).encode())
        self._file.seek(0)
        stored = self._file.read()
        lines = stored.splitlines(keepends=True)
        if not self._resume or not lines or lines[0] != head:
            self._file.truncate(0)
            self._file.write(head)
            return
        if not lines[-1].endswith(b"\n"):
            self._file.truncate(len(stored) - len(lines[-1]))
        for line in filter(None, map(_read, lines[1:])):
            self._lines[line.name] = line
        done = sum(len(line.terms.a) for line in self._lines.values())
        if done and self._announce is not None:
            self._announce(done, matrices)

    def remember(
        self, name: str, digests: tuple[str, str, str], compute: Callable[[], Terms]
    ) -> Terms:
        """A tensor's terms: as they were found for these bytes, or found now and written down.

        Args:
            name: The tensor.
            digests: Of task tensor, base tensor and delta.
            compute: The work.
        """
        line = self._lines.get(name)
        if line is None or line.digests != digests:
            began = time.monotonic()
            terms = compute()
            line = _Line(name, digests, terms, time.monotonic() - began)
            with self._lock:
                self._file.write(_signed(_LINE.dump_json(line)))
        self.seconds[name] = line.seconds
        return line.terms


def _signed(payload: bytes) -> bytes:
    """A line: the digest of what follows, and what follows."""
    return blake3(payload).hexdigest().encode() + b" " + payload + b"\n"


def _read(line: bytes) -> _Line | None:
    """A line's content, or None if it is not whole."""
    payload = line.partition(b" ")[2].removesuffix(b"\n")
    if line != _signed(payload):
        return None
    try:
        return _LINE.validate_json(payload)
    except ValidationError:
        return None
