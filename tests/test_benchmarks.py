"""The benchmarks' commands are known to work; what they measure here means nothing."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_planning():
    before = sorted((BENCHMARKS / "results").iterdir())
    command = [sys.executable, str(BENCHMARKS / "plan.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("96x96 flat", "80x320 decaying", "model of 1 layers"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(what)]
        assert line.count("x ") + line.endswith("x") >= 2  # a ratio cold, a ratio cached
    assert sorted((BENCHMARKS / "results").iterdir()) == before
