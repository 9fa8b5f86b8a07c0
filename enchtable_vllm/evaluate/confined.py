"""The program that runs another one, from its standard input, with nothing to spend.

Started by `sandbox` as a file, in an isolated interpreter: it imports the standard library only.
What it gives up it gives up before the first foreign line runs, and cannot take back.
"""

import ctypes
import importlib
import os
import resource
import struct
import sys
import types
from contextlib import suppress
from pathlib import Path

#: Loaded before the privileges go: the library may lie where only they reach.
_WANTED = (
    "bisect cmath collections copy datetime decimal fractions functools hashlib heapq itertools "
    "json math operator random re statistics string textwrap typing"
)
_NOBODY = 65534

# Landlock, from linux/landlock.h: the system calls are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH, _NO_NEW_PRIVS = 1, 1, 38
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
#: By version: all that can be done to files, of which one that is not named is allowed to all.
_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
#: What Python reads while a program imports: its library, and the system's.
_LIBRARIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")


def landlock_version() -> int:
    """Of this kernel's; 0: it has none."""
    with suppress(AttributeError, OSError):  # no Linux
        found: int = ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, _VERSION)
        return max(0, found)
    return 0


def _keep_to(folder: Path) -> None:
    """Everything in a folder, and Python's library to read: no other file, from now on."""
    version = landlock_version()
    if not version:
        return
    call = ctypes.CDLL(None, use_errno=True).syscall
    everything = _ALL[min(version, max(_ALL))]
    handled = ctypes.create_string_buffer(struct.pack("=Q", everything))
    ruleset = call(_CREATE_RULESET, handled, 8, 0)
    to_read = _EXECUTE | _READ_FILE | _READ_DIR
    rules: list[tuple[str | Path, int]] = [(folder, everything)]
    rules += [(path, to_read) for path in {*_LIBRARIES, sys.base_prefix, sys.base_exec_prefix}]
    for path, allowed in rules:
        with suppress(OSError):  # not there, or not for this user
            opened = os.open(path, os.O_PATH)
            if not Path(path).is_dir():
                allowed &= _EXECUTE | _READ_FILE
            rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, opened))
            _demand(call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0)
            os.close(opened)
    libc = ctypes.CDLL(None, use_errno=True)
    _demand(ruleset >= 0 and libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
    _demand(call(_RESTRICT_SELF, ruleset, 0) == 0)
    os.close(ruleset)


def _demand(done: bool) -> None:
    if not done:
        raise OSError(ctypes.get_errno(), "Landlock")


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
    _keep_to(Path.cwd())
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _main() -> None:
    source = sys.stdin.read()
    for name in _WANTED.split():
        importlib.import_module(name)
    _confine(*map(int, sys.argv[1:4]))
    del sys.argv[1:]
    # Not as the main module: what a program would do there comes before its tests, and ends it.
    module = types.ModuleType("program")
    sys.modules[module.__name__] = module
    exec(compile(source, "program", "exec"), module.__dict__)


if __name__ == "__main__":
    _main()
