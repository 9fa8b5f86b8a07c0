"""The command ``enchtable``, as a user runs it."""

import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from enchtable_vllm import cli

ENCHTABLE = Path(sys.executable).with_name("enchtable")


def execute(*arguments, code=0):
    """In a process of its own: (standard output, standard error)."""
    done = subprocess.run(
        [str(ENCHTABLE), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def run(*arguments, code=0):
    """The same in this process: another one takes seconds to import torch."""
    out, errors = io.StringIO(), io.StringIO()
    stops = {stop: signal.getsignal(stop) for stop in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with (
            pytest.raises(SystemExit) as ended,
            redirect_stdout(out),
            redirect_stderr(errors),
            patch.object(sys, "argv", [str(ENCHTABLE), *map(str, arguments)]),
        ):
            cli.main()
    finally:
        for stop, handler in stops.items():
            signal.signal(stop, handler)
    assert ended.value.code == code, out.getvalue() + errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    return out.getvalue(), errors.getvalue()
