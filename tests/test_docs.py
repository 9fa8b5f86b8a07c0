"""The pages of docs/ say what the code does, and the site is built from them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_text import PAGES, ROOT, blocks, commands, is_synopsis, mentions
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.serving.config import LoaderConfig

COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]
#: Pages whose commands are typed one after the other, and what is there before.
TYPED = ("quickstart.md", "vectors.md", "plan.md", "tuning.md", "merge.md", "doctor.md")


def run(*command):
    """In a process of its own, with this tree's code."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_the_reference_is_what_the_code_says():
    done = run("docs/_reference", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_is_built_and_every_link_leads_somewhere(tmp_path):
    (recipe,) = re.findall(
        r"^docs: .*\n\t@\$\(BIN\)/python (.*) site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    done = run(*recipe.split(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists()
    assert (tmp_path / "openapi.json").exists()


def find(words):
    """The command that the words begin with, and the rest."""
    command = cli.load(words[0])
    inner = getattr(command, "commands", None)
    return (command, words[1:]) if inner is None else (inner[words[1]], words[2:])


def offered_by(leaf):
    return {name for p in leaf.params for name in (*p.opts, *p.secondary_opts)}


def options_of(command):
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", command)) - {"--help"}


def test_what_running_text_mentions_is_there():
    for page in PAGES:
        for command in mentions(page):
            words = command.split()
            inner = getattr(cli.load(words[0]), "commands", None)
            if inner is None or len(words) > 1:
                leaf, _ = find(words)
                assert options_of(command) <= offered_by(leaf), (page.name, command)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_one_that_there_is(page, command, tmp_path, monkeypatch):
    """As a whole; of a synopsis its options."""
    leaf, arguments = find(shlex.split(command.replace("'", " ") if "[" in command else command))
    if is_synopsis(command):
        assert options_of(command) <= offered_by(leaf)
        return
    for vector in ("safety-vector", "VECTOR"):
        (tmp_path / vector).mkdir()  # what must exist to be named
    monkeypatch.chdir(tmp_path)
    leaf.make_context(page, arguments)


def test_every_command_has_its_how_to():
    """Besides its section of the reference, which is made."""
    pages = [page for page in PAGES if page.name not in ("README.md", "cli.md")]
    shown = {" ".join(c.split()[:2]) for page in pages for c in commands(page)}
    shown |= {name.split()[0] for name in shown} | {"demo"}  # 'make demo' runs it
    for name in cli.COMMANDS:
        for part in getattr(cli.load(name), "commands", [""]):
            assert f"{name} {part}".strip() in shown


def test_no_help_is_taken_for_markup():
    """Rich would leave '[@revision]' out of --help."""
    for name in cli.COMMANDS:
        command = cli.load(name)
        for leaf in getattr(command, "commands", {name: command}).values():
            for parameter in leaf.params:
                assert not re.search(r"(?<!\\)\[", parameter.help or ""), (name, parameter.name)


def test_every_loader_config_is_one():
    found = [
        (page.name, config)
        for page in PAGES
        for line in blocks(page)
        for config in re.findall(r"--model-loader-extra-config '(.*?)'", line)
        if "..." not in config
    ]
    assert len(found) > 5
    for page, config in found:
        assert LoaderConfig.parse(json.loads(config)), page


def test_make_targets_and_routes_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    routes = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"].keys()
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        text = page.read_text()
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets, page
        assert set(re.findall(r"(?<![\w.])(?:/v1)?/enchtable/[a-z]+\b", text)) <= routes, page


def test_environment_variables_are_those_of_the_code():
    def named(paths):
        return {v for path in paths for v in re.findall(r"\bENCHTABLE_[A-Z_]+\b", path.read_text())}

    assert named(PAGES) == named((ROOT / "enchtable_vllm").rglob("*.py"))


@pytest.fixture
def here(family, tmp_path, monkeypatch):
    """The folders that the pages name, in the current one."""
    for name in ("aligned", "surrogate", "base", "task"):
        target = "my-finetune" if name == "task" else name
        shutil.copytree(getattr(family, name), tmp_path / target)
    shutil.copytree(family.vector, tmp_path / "safety-vector")
    shutil.copytree(family.vector, tmp_path / "vectors" / "sv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(name):
    """The commands of a page that need no server."""
    lines = [c for c in commands(ROOT / "docs" / name) if "--url" not in c and not is_synopsis(c)]
    assert lines
    for line in lines:
        for output in re.findall(r" -o (\S+)", line):
            shutil.rmtree(output, ignore_errors=True)
    return lines


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", [name for name in TYPED if name != "doctor.md"])
def test_a_page_can_be_typed_as_it_stands(page):
    for line in typed(page):
        if line.startswith("doctor"):  # takes its time: below
            continue
        result = CliRunner().invoke(cli.app, shlex.split(line))
        assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_doctor_can_be_asked_as_it_stands():
    for line in typed("doctor.md"):
        result = CliRunner().invoke(cli.app, shlex.split(line), env={"COLUMNS": "200"})
        assert result.exit_code == 0, (line, result.output)


@pytest.mark.slow
def test_vllm_has_the_options_that_it_is_served_with():
    vllm = Path(sys.executable).with_name("vllm")
    offered = run(vllm, "serve", "--help=all").stdout
    lines = [line for page in PAGES for line in blocks(page) if line.startswith("vllm serve ")]
    used = {option for line in lines for option in re.findall(r" (--[a-z-]+)", line)}
    assert "--load-format" in used
    assert used <= set(re.findall(r"--[a-z][a-z-]+", offered))
