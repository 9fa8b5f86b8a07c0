"""The commands, each in a process of its own, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.errors import EnchTableError

ROOT = Path(__file__).parent.parent
TOKEN = "admin-token-of-this-test"
MAIN = "from enchtable_vllm.cli import main; main()"


def environment(**variables):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ENCHTABLE_ADMIN", "ENCHTABLE_JUDGE", "VLLM_API_KEY"))
    }
    return kept | {"COLUMNS": "200"} | variables


def start(*arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
        cwd=ROOT,
    )


def command(*arguments, code=0, **variables):
    """(standard output, standard error)."""
    with start(*arguments, **variables) as process:
        out, error = process.communicate(timeout=120)
    assert process.returncode == code, out + error
    assert "Traceback" not in error
    return out, error


def written(path, value):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(json.dumps(value))
    return path


def inside(*arguments, **variables):
    """In this process, for what ends without asking: (exit code, message). Inspect would warn."""
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), env=environment(**variables))
    if isinstance(done.exception, EnchTableError):
        return 1, str(done.exception)
    return done.exit_code, " ".join(done.output.split())
