"""Where there is no library of Helm's, all that needs none is tested all the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: What a machine is there whose wheels have no Helm.
ELSEWHERE = """
import platform, sys
platform.machine = lambda: "aarch64"
sys.modules["helm_python"] = None
"""


def test_only_what_helm_renders_is_left_out_and_the_reason_is_shown(tmp_path):
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    # These load vLLM, start something or build something, and are no more of this machine.
    left_out = [f"--ignore={HERE / f'test_{name}.py'}" for name in
                ("without_helm", "arguments", "chart_serves", "compose", "docker")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "elsewhere", "-rA", *left_out, HERE],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=HERE.parents[1],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = set(re.findall(r"^PASSED \S+::(\w+(?:\[[\w ]+\])?)", done.stdout, re.MULTILINE))
    assert "test_kserve_takes_them" in passed
    assert "test_resources_are_bounded[kserve]" in passed
    assert "test_resources_are_bounded[production stack]" in passed
    assert "test_resources_are_bounded[minimal]" not in passed
    reasons = set(re.findall(r"^SKIPPED .*?\d+: (.*)$", done.stdout, re.MULTILINE))
    assert reasons == {"there is no wheel of Helm's library for aarch64: no chart can be rendered"}
