"""Files of users, and our own: read with a bound, understood one way, written whole or not at all.

Without torch, which `checkpoint` brings: comparing reports must not take its seconds.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3
from filelock import FileLock, Timeout

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.files import parse_json

_MAX_BYTES = 1_000_000_000


def read_bytes(path: Path) -> bytes:
    """A file's bytes; of one that ends in ``.gz``, what is packed in it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, or too large.
    """
    if not path.is_file():  # a FIFO would wait for a writer
        raise ValueError("no such file" if not path.exists() else "something else than a file")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data: bytes = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES:,} bytes")
    return data


def parse_lines(data: bytes) -> list[tuple[int, Any]]:
    """What lines of JSON say, with their numbers; blank lines say nothing.

    Raises:
        ValueError: Which line is no JSON, and why.
    """
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                found.append((number, parse_json(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return found


def digest_of(data: bytes) -> str:
    """To tell files apart."""
    return f"blake3:{blake3(data).hexdigest()}"


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text.

    Raises:
        ConfigError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"output '{path}'",
            expected="a place with room and permission to write",
            got=error,
            fix="Make room, or choose another output, and run the same command again.",
        ) from error


def private_folder(folder: Path) -> None:
    """Make a folder for its owner alone: for answers that nobody else should read."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


@contextmanager
def only_writer(output: Path, doing: str) -> Iterator[None]:
    """Make a folder, and keep other processes from writing to it meanwhile.

    Raises:
        ConfigError: One is; ``doing`` says what.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"output '{output}'",
            expected=f"no other process {doing} to the same place",
            got="one that is",
            fix="Wait for it, or choose another output.",
        ) from error
    try:
        yield
    finally:
        lock.release()
