"""A refusal is the last thing a person reads, not the middle of three tracebacks.

vLLM loads models in worker processes; when one fails, each process on the way up prints a
traceback of its own, and the reason is hundreds of lines above the prompt. So a worker that
refuses leaves its message in a file, and the process that the user started prints it at its
very end, if it ends by an unhandled exception.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import secrets
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from enchtable_vllm.errors import EnchTableError

#: The file's path, inherited by every process that vLLM starts.
_VARIABLE = "ENCHTABLE_LAST_WORD"
_installed = False


def install() -> None:
    """In the process that the user started: choose the file and print it at exit.

    Does nothing in processes that multiprocessing started, and nothing the second time.
    """
    global _installed
    if _installed or multiprocessing.parent_process() is not None:
        return
    _installed = True
    name = f"enchtable-{os.getpid()}-{secrets.token_hex(16)}"
    path = Path(tempfile.gettempdir(), name)
    os.environ[_VARIABLE] = str(path)
    atexit.register(_print, path)


def leave(error: EnchTableError) -> None:
    """In the process that refuses: leave the message for the end. Never raises."""
    path = os.environ.get(_VARIABLE)
    if not path:
        return
    # O_EXCL: the first rank's message is enough, and no file of somebody else's is written to.
    with suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")


def _print(path: Path) -> None:
    with suppress(OSError):
        message = path.read_text(encoding="utf-8")
        path.unlink()
        # Set by the interpreter when an exception ended the program; a program that handled the
        # failure has had the message in its log already.
        if hasattr(sys, "last_value"):
            sys.stderr.write(f"\nenchtable refused to serve this model.\n{message}\n")
