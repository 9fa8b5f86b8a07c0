"""The program that runs another one, from its standard input, with nothing to spend.

Started by `sandbox` as a file, in an isolated interpreter: it imports the standard library only.
What it gives up it gives up before the first foreign line runs, and cannot take back.
"""

import importlib
import os
import resource
import sys

#: Loaded before the privileges go: the library may lie where only they reach.
_WANTED = (
    "bisect cmath collections copy datetime decimal fractions functools hashlib heapq itertools "
    "json math operator random re statistics string textwrap typing"
)
_NOBODY = 65534


def _confine(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _main() -> None:
    source = sys.stdin.read()
    for name in _WANTED.split():
        importlib.import_module(name)
    _confine(*map(int, sys.argv[1:4]))
    del sys.argv[1:]
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _main()
