"""Runs `probe` in a fresh interpreter and reads what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PROBE = Path(__file__).with_name("probe.py")
#: Importing vLLM from a cold network disk takes a minute or more; a child that hangs takes all.
_TIMEOUT_SECONDS = 300.0
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Step:
    """What came of one step.

    Attributes:
        value: What the step found.
        error: The root cause, if it failed: the last line of its traceback.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def run_steps(
    names: Sequence[str], *, timeout_seconds: float = _TIMEOUT_SECONDS
) -> dict[str, Step]:
    """Run steps of `probe`, in order, in one fresh interpreter.

    Args:
        names: Among `probe.STEPS`.
        timeout_seconds: For all of them.

    Returns:
        A result for each name. A child that dies fails the step it was in; those after it say
        that they were not reached.
    """
    with tempfile.TemporaryDirectory(prefix="enchtable-doctor-") as folder:
        report = Path(folder, "report")
        report.touch()
        # -P: the folder of the script is no place to import from.
        command = [sys.executable, "-P", str(_PROBE), str(report), *names]
        try:
            done = subprocess.run(
                command,
                env={**_QUIET, **os.environ},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_seconds,
                check=False,
            )
            died = f"the process ended {_how(done.returncode)}"
        except subprocess.TimeoutExpired:
            died = f"no end after {timeout_seconds:.0f} s"
        lines = map(json.loads, report.read_text(encoding="utf-8").splitlines())
        found = {line["step"]: Step(line.get("value", {}), line.get("error", "")) for line in lines}
    for name in names:
        if name not in found:
            found[name] = Step(error=died)
            died = "not reached"
    return found


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
