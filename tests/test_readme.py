"""The documentation says what the code does: commands, options, keys, targets."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.versions import lower_bound, newest_tested

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
#: A command, with the indented lines that continue it.
COMMANDS = re.findall(r"^enchtable .*(?:\n    .*)*", BLOCKS, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[:3]))
def test_documented_options_exist(command):
    words = command.split()[1:]
    name = words[:2] if words[0] == "vector" else words[:1]
    result = CliRunner().invoke(cli.app, [*name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(words)))
    offered = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", result.output))
    assert options <= offered


def test_every_command_is_documented():
    documented = {" ".join(c.split()[1 : 3 if c.split()[1] == "vector" else 2]) for c in COMMANDS}
    assert documented == {
        "distill",
        "vector build",
        "vector factor",
        "vector inspect",
        "vector sign",
        "vector verify",
        "plan",
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


def test_every_loader_key_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", README, re.MULTILINE))
    assert rows.keys() == LoaderConfig.model_fields.keys()
    assert rows["verify"] == f"`{LoaderConfig().verify}`"
    assert rows["inner_load_format"] == f"`{LoaderConfig().inner_load_format}`"


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


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_ci_runs_the_readmes_own_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^make test ", BLOCKS, re.MULTILINE)
