"""Opening files that may come from anywhere: never waits, never reads without a bound; no torch.

What is wrong is told as `OSError` or `ValueError`, in words that fit an error message's "got":
the caller knows what the file is for, and what to do.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

#: The most that a manifest, a plan, an index or a config may hold: safetensors' own bound on a
#: header. The largest open models, with 70,000 tensors, need half of it.
MAX_JSON_BYTES = 100_000_000

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file with. Opening a FIFO would wait for a writer.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is something else than a file, or the path holds a NUL.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(_KINDS.get(stat.S_IFMT(mode), "something else than a file"))
    return descriptor


def is_there(path: Path) -> bool:
    """Whether something has this name; without permission to know, True: opening says why."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def refuse_link_out(path: Path, home: Path) -> None:
    """Refuse a link that leads out of a folder.

    Args:
        path: The link, or what is none.
        home: The folder, resolved.

    Raises:
        ValueError: It does, or leads nowhere.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise ValueError(f"'{path.name}', a link to itself") from error
    if not target.is_relative_to(home):
        raise ValueError(f"'{path.name}', a link to '{target}'")


def read_json(path: Path) -> tuple[Any, bytes]:
    """What a JSON file says, and its bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, too large, not JSON, nested too deeply, or holds a key twice
            in one object.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, more than {MAX_JSON_BYTES:,}")
        data = file.read(size)
    return parse_json(data), data


def parse_json(data: bytes) -> Any:
    """What JSON says, if it says it once.

    Raises:
        ValueError: It is not strict UTF-8 JSON, is nested too deeply, or holds a key twice in
            one object, which two readers may understand differently.
    """
    from_json(data)  # strict, and bounded in depth: the standard library's parser is neither
    return json.loads(data, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' twice in one object")
    return found
