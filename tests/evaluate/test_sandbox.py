"""Programs that models might write, and what becomes of them and of this machine."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from enchtable_vllm.evaluate import confined
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
    deadline = time.monotonic() + 10  # killed it is; a busy machine takes its time to end it
    while running(str(mine)) and time.monotonic() < deadline:
        time.sleep(0.1)
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


def test_files_of_others_are_out_of_reach_where_the_kernel_allows_it():
    """Of whoever runs the evaluation, too: whose keys lie in a home folder."""
    if not confined.landlock_version():
        pytest.skip("this kernel has no Landlock")
    assert "its own files only" in isolation()
    with tempfile.TemporaryDirectory() as name:  # one that everybody may enter, and write to
        folder = Path(name)
        folder.chmod(0o777)
        theirs = folder / "theirs"
        theirs.write_text("secret")
        theirs.chmod(0o666)
        for source in (
            f"open({str(theirs)!r}).read()",
            f"open({str(theirs)!r}, 'a')",
            f"import os; os.remove({str(theirs)!r})",
            f"open({str(folder / 'new')!r}, 'w')",
            f"import os; os.listdir({name!r})",
            "open('/dev/shm/enchtable-test', 'w')",
            "open('/etc/passwd')",
            "import os; os.symlink('/etc/passwd', 'link'); open('link')",
        ):
            assert ran(source) == "failed", source
        assert theirs.read_text() == "secret"
        assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert ran("import os; os.mkdir('a'); open('a/b', 'w'); os.rename('a/b', 'b')") == "passed"


def test_who_keeps_to_a_folder_can_still_import(tmp_path):
    """What the sandbox loads beforehand apart: a program may want any of Python's library."""
    source = (
        "import sys; from pathlib import Path; from runpy import run_path\n"
        f"run_path({confined.__file__!r})['_keep_to'](Path.cwd())\n"
        "import decimal, sqlite3, unittest, zoneinfo, xml.etree.ElementTree\n"
        "Path('mine').write_text('x')\n"
        "try: Path(sys.argv[1]).read_text(); print('read')\n"
        "except PermissionError: print('kept')\n"
    )
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.write_text("x")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source, str(other)],
        cwd=work, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ("kept\n" if confined.landlock_version() else "read\n")


def test_isolation_by_limits_alone(monkeypatch):
    from enchtable_vllm.evaluate import sandbox

    monkeypatch.setattr(sandbox, "_isolating", lambda: ())
    monkeypatch.setattr(sandbox.confined, "landlock_version", lambda: 0)  # of this process
    assert "limits only" in isolation()
    assert ran("assert True") == "passed"
    assert ran("import os; os.fork()") == "failed"
    assert ran("import time; time.sleep(60)", Limits(seconds=1.0)) == "timeout"
