"""Runs a program that a model wrote: in a process of its own, with limits, and killed whole.

Every program gets a new process group and session, an empty environment (no key, no token), a
temporary folder as its working directory, limits on processor time, memory, file size, open
files and further processes, and a time-out by the clock. Run by root it becomes ``nobody``.
Where the kernel lets it, it also gets namespaces of its own: no network, no other process in
sight, and its end ends whatever it started; and Landlock: of all files it reaches those of its
folder, and to read, Python's own. Where not, `isolation` says so.

This keeps mistakes from doing harm. It is no wall against a program that means it: what it says of
itself can be forged, it can fill the disk for as long as it runs, and where the kernel has no
Landlock it can do to files whatever its user can. For that, run the evaluation in a container.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from enchtable_vllm.evaluate import confined

Outcome = Literal["passed", "failed", "timeout"]

_NOBODY = 65534
_PROBE_SECONDS = 10
#: From the strictest to none.
_NAMESPACES: tuple[tuple[str, ...], ...] = (
    ("--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ("--net", "--pid", "--fork", "--kill-child"),
    ("--net",),
)


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its last line.

    Args:
        source: Python.
        limits: What it may use.

    Returns:
        ``passed``: its last line was reached, which an early exit does not (a program that looks
        for how this is told could say so all the same); ``timeout``: the clock's; ``failed``:
        anything else, processor time and memory included.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    whole = f"{source}\n\nimport sys as _s\n_s.__stdout__.write('\\n{token}\\n')\n"
    with tempfile.TemporaryDirectory(prefix="enchtable-eval-") as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        if os.geteuid() == 0:
            folder.chmod(0o711)
            os.chown(work, _NOBODY, _NOBODY)
        output = folder / "output"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*_isolating(), sys.executable, "-I", "-S", confined.__file__,
                 *map(str, (limits.cpu_seconds, limits.memory_bytes, limits.file_bytes))],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.DEVNULL,
                cwd=work,
                env={"LC_ALL": "C.UTF-8", "HOME": str(work), "TMPDIR": str(work)},
                start_new_session=True,
            )  # fmt: skip
            try:
                process.communicate(whole.encode("utf-8", "replace"), timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                _end(process)
        reached = output.read_bytes().rstrip().endswith(token.encode())
    return "passed" if reached and process.returncode == 0 else "failed"


def isolation() -> str:
    """In words, what stands around a program here, for the report."""
    options = _isolating()
    words = ["its own files only"] if confined.landlock_version() else []
    if "--pid" in options:
        words.append("namespaces of its own for network and processes")
    elif "--net" in options:
        words.append("no network")
    return ", ".join(words) or "limits only: this kernel refuses namespaces and Landlock"


@cache
def _isolating() -> Sequence[str]:
    """The command that comes before the interpreter; empty if there is none that works."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    user = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    for options in _NAMESPACES:
        command = (unshare, *user, *options, "--")
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [*command, "true"], capture_output=True, timeout=_PROBE_SECONDS, check=False
            )
            if done.returncode == 0:
                return command
    return ()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group, and the first process of the namespace, which may have left the group."""
    pids = []
    with suppress(OSError):
        pids = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
