"""The README says what the code does; what it shares with the pages of docs/ is in test_docs.py."""

import re
import runpy
import subprocess
import sys

from docs_text import ROOT, blocks, commands

from enchtable_vllm.serving.versions import lower_bound, newest_tested

README = (ROOT / "README.md").read_text()


def test_every_command_is_documented():
    words = [command.split() for command in commands(ROOT / "README.md")]
    documented = {" ".join(w[: 2 if w[0] == "vector" else 1]) for w in words}
    assert documented == {
        "distill",
        "vector build",
        "vector factor",
        "vector inspect",
        "vector sign",
        "vector verify",
        "plan",
        "report",
        "merge",
        "doctor",
        "status",
        "swap",
        "rollback",
        "rollout",
        "eval",
        "compare",
        "tune",
    }
    assert "`enchtable demo`" in README


def test_the_versions_that_are_claimed_are_those_that_were_run():
    """One place states them: the README's row and the table follow from it."""
    (row,) = re.findall(r"^\| tested \| vLLM ([\d.]+) to ([\d.]+) ", README, re.MULTILINE)
    assert row == (str(lower_bound()), str(newest_tested()))
    path = ROOT / "deploy" / "cpu" / "matrix.py"
    table = runpy.run_path(str(path))["table"]
    assert (ROOT / "docs" / "versions.md").read_text() == table()


def test_what_is_supported_is_what_the_tests_prove():
    command = [sys.executable, str(ROOT / "tests" / "supported.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr


def test_links_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_ci_runs_the_readmes_own_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert any(line.startswith("make test ") for line in blocks(ROOT / "README.md"))
