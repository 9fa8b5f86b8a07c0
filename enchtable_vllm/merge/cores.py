"""Which cores this process may use, whatever its main thread is bound to."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch


def has_idle_core() -> bool:
    """Whether this process may run on more cores than torch's threads keep busy."""
    return len(_cores()) > torch.get_num_threads()


def use_every_core() -> None:
    """Let this thread run where any thread of its process may.

    VLLM's CPU workers bind their main thread to one core, which a new thread inherits: it would
    take turns with the very one that it is to work beside.
    """
    with suppress(OSError, AttributeError):  # not allowed; not Linux
        os.sched_setaffinity(0, _cores())


def _cores() -> set[int]:
    cores: set[int] = set()
    with suppress(OSError, AttributeError):  # a thread has ended meanwhile; not Linux
        for thread in Path("/proc/self/task").iterdir():
            cores |= os.sched_getaffinity(int(thread.name))
    return cores
