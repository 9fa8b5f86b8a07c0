"""The README says what the code does; what it shares with the pages of docs/ is in test_docs.py."""

import re
import runpy
import subprocess
import sys

import pytest
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


def anchors(page):
    """Of its headings, by GitHub's rule; the site's is the same."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    """Those of the site's pages are checked where it is built."""
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", (ROOT / name).read_text())
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"


def test_ci_runs_the_readmes_own_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert any(line.startswith("make test ") for line in blocks(ROOT / "README.md"))
