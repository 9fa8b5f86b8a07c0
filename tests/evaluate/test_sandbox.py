"""Programs that models might write, and what becomes of them and of this machine."""

import os
import socket
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from enchtable_vllm.evaluate.sandbox import Limits, isolation, run_program

QUICK = Limits(seconds=6.0, cpu_seconds=4, memory_bytes=300 << 20, file_bytes=1 << 16)


def ran(source, limits=QUICK):
    return run_program(textwrap.dedent(source), limits)


@pytest.mark.parametrize(
    "source",
    [
        "assert sum(range(10)) == 45",
        "print('x' * 1000)",
        "import math, re, collections, typing, hashlib, random, heapq, decimal",
        "open('mine', 'w').write('x' * 100)",
        "import os; assert set(os.environ) <= {'LC_ALL', 'HOME', 'TMPDIR', 'LC_CTYPE'}",
        "import os; assert os.getuid() != 0 or os.geteuid() != 0",
        "import sys; assert len(sys.argv) == 1",
    ],
)
def test_what_passes(source):
    assert ran(source) == "passed"


@pytest.mark.parametrize(
    "source",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "x = 'x' * (1 << 30)",
        "open('large', 'w').write('x' * (1 << 17))",
        "while True: print('x' * 1000)",
        "import os; os.abort()",
        "import subprocess; subprocess.run(['true'], check=True)",
        "import os; os.fork()",
        "open('/etc/enchtable-test', 'w')",
        "import os; os.setuid(0)",
    ],
)
def test_what_fails(source):
    assert ran(source) == "failed"


def test_time_is_limited_by_the_clock_and_by_the_processor():
    started = time.monotonic()
    assert ran("import time; time.sleep(60)", Limits(seconds=1.0)) == "timeout"
    assert ran("while True: pass", Limits(seconds=30.0, cpu_seconds=1)) == "failed"
    assert time.monotonic() - started < 25


def running(argument):
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            if argument in path.read_bytes().decode().split("\0"):
                return True
    return False


def test_nothing_is_left_running():
    """A program that leaves its group is gone, too, when its time is up."""
    source = """
        import os, time
        try:
            os.setsid()
        except OSError:
            pass
        time.sleep(60)
    """
    mine = 100_000 + os.getpid()  # shown among the arguments
    assert ran(source, Limits(seconds=2.0, file_bytes=mine)) == "timeout"
    assert not running(str(mine))


def test_no_network_and_no_other_process_where_the_kernel_allows_it():
    words = isolation()
    if "namespaces" not in words or "refuses" in words:
        pytest.skip(words)
    source = "import socket; socket.create_connection(('127.0.0.1', {}), timeout=1)"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert ran(source.format(listening.getsockname()[1])) == "failed"
    assert ran(f"import os; os.kill({os.getpid()}, 0)") == "failed"
    assert ran(f"import os; assert not os.path.exists('/proc/{os.getpid()}/environ')") == "passed"


def test_isolation_by_limits_alone(monkeypatch):
    from enchtable_vllm.evaluate import sandbox

    monkeypatch.setattr(sandbox, "_isolating", lambda: ())
    assert "limits only" in isolation()
    assert ran("assert True") == "passed"
    assert ran("import os; os.fork()") == "failed"
    assert ran("import time; time.sleep(60)", Limits(seconds=1.0)) == "timeout"
