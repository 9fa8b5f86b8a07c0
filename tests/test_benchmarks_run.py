"""Benchmarks that need vLLM, run through with few rounds."""

import json
import subprocess
import sys

import pytest
from docs_text import ROOT
from test_benchmarks import python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "providers"),
    [
        ("kernels", "fused_add", {"fused_add", "memcpy", "torch reference"}),
        ("load", "load_weights", {"auto", "enchtable bf16", "enchtable int8",
                                  "merge to disk, then auto"}),
        ("swap", "swap", {"enchtable", "restart", "reload by plain vLLM", "no swap"}),
        ("alternatives", "answer", {"task model", "merged", "LoRA, rank 8", "Self-Reminder",
                                    "SafeDecoding"}),
    ],
)  # fmt: skip
def test_each_runs_through(name, what, providers):
    """What is promised is not looked at: so few rounds tell nothing of speed."""
    done = python("run", name, "--quick", "--json")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    found = {one["provider"] for one in json.loads(done.stdout) if one["op"] == what}
    assert found == providers


#: The merge on disk is of another beta than what is loaded with.
WRONG = """
import json, sys
from pathlib import Path
from benchmarks import load_cases, load_worker
from benchmarks.harness import NotVerified
merge = load_worker.Case.merge
def another(self, stored):
    plan = self.vectors[stored][1]
    right = plan.read_text()
    document = json.loads(right)
    plan.write_text(json.dumps({**document, "beta": document["beta"] / 2}))
    try:
        return merge(self, stored)
    finally:
        plan.write_text(right)
load_worker.Case.merge = another
case = load_cases.make("small", Path(sys.argv[1]))
plan = load_worker.Plan({"warm": 1}, (1,))
try:
    load_worker.run_in_vllm(case, load_worker.measure_loads, plan)
except NotVerified as error:
    print("REFUSED", error)
"""


@pytest.mark.slow
def test_a_load_that_is_not_the_offline_merge_has_no_figures(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WRONG, str(tmp_path / "small")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert "REFUSED" in done.stdout, done.stdout + done.stderr
    assert "expected the offline merge's bits, got others in" in done.stdout
