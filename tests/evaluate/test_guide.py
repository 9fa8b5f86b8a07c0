"""docs/evaluate.md: its commands have the options that it says, and none is left out."""

import re

import pytest
from eval_runs import ROOT
from typer.testing import CliRunner

from enchtable_vllm import cli

GUIDE = (ROOT / "docs" / "evaluate.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\w*\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^enchtable .*(?:\n    .*)*", BLOCKS, re.MULTILINE)
OPTION = r"(?<![\w-])--[a-z][a-z-]*"


def offered(name):
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "250"})
    assert result.exit_code == 0
    return set(re.findall(OPTION, result.output)) - {"--help"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[:2]))
def test_documented_options_exist(command):
    assert set(re.findall(OPTION, command)) <= offered(command.split()[1])


def test_every_option_of_eval_is_documented():
    shown = {option for c in COMMANDS if c.split()[1] == "eval" for option in re.findall(OPTION, c)}
    assert offered("eval") - {"--output"} == shown


def test_all_three_commands_are_there():
    assert {command.split()[1] for command in COMMANDS} == {"eval", "compare", "tune"}
