"""What each rank's load did, left where the API servers find it.

Ranks load models in processes of their own, and vLLM carries nothing of ours from there to the
process that answers ``/metrics``. So the process that the user started chooses a folder, which
every other inherits by name; each process that merged leaves what it did there, and the folder
goes when the server does. On the machine of the API servers: other machines' ranks are not seen.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

#: The folder's path, inherited by every process that vLLM starts.
_VARIABLE = "ENCHTABLE_RECORDS"
_installed = False


def install() -> None:
    """In the process that the user started: choose the folder, and remove it at exit.

    Does nothing in processes that multiprocessing started, and nothing the second time. The
    folder is made by the first process that has something to leave.
    """
    global _installed
    if _installed or multiprocessing.parent_process() is not None:
        return
    _installed = True
    name = f"enchtable-{os.getpid()}-{secrets.token_hex(16)}.records"
    path = Path(tempfile.gettempdir(), name)
    os.environ[_VARIABLE] = str(path)
    atexit.register(shutil.rmtree, path, ignore_errors=True)


def leave(record: Mapping[str, Any]) -> None:
    """In a process that merged: leave what it did, in place of what it left before.

    Never raises, and whoever reads meanwhile finds the record before or after, whole.
    """
    folder = os.environ.get(_VARIABLE)
    if not folder:
        return
    path = Path(folder, f"{os.getpid()}.json")
    partial = path.with_suffix(".partial")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file)
        partial.replace(path)


def read() -> list[dict[str, Any]]:
    """The records of all processes of this server, in no order that means anything."""
    folder = os.environ.get(_VARIABLE)
    if not folder:
        return []
    return [json.loads(path.read_bytes()) for path in sorted(Path(folder).glob("*.json"))]
