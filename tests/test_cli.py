"""The command: help, exit codes, tables, JSON, and every error as one message."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from commands import execute, run
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.plan import read_plan


def test_build_plan_merge_as_documented(family, tmp_path):
    """The README's pipeline, by its commands."""
    task = tmp_path / "task"
    shutil.copytree(family.task, task, ignore=shutil.ignore_patterns("merge_plan.json", "safety*"))
    vector = task / "safety-vector"
    ends = ("--aligned", family.aligned, "--surrogate", family.surrogate)
    out, _ = execute(
        "vector", "build", *ends, "--scope", "attention", "--dtype", "bf16", "-o", vector
    )
    assert "Handle it like the surrogate" in out
    out, _ = execute("vector", "verify", vector)
    assert "8 tensors verified" in out
    out, _ = execute("vector", "inspect", vector)
    assert "self_attn.q_proj.weight" in out
    names = ("--task-model", task, "--base-model", family.base, "--safety-vector", vector)
    out, _ = execute("plan", *names, "--beta", "0.5")
    for text in (
        "self_attn.q_proj",
        "kept 13: not in the safety vector",
        "norm scale",
        "vllm serve",
    ):
        assert text in out
    assert "--model-loader-extra-config" not in out  # the folder carries everything
    assert (task / "merge_plan.json").read_text() == family.plan.read_text()
    merge = ("merge", "--task-model", task, "--safety-vector", vector)
    out, _ = execute(*merge, "--plan", task / "merge_plan.json", "-o", tmp_path / "merged")
    assert "safety vector merged: 8 merged, 13 kept, 0 filtered" in out
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_json_is_all_there_is_on_standard_output(family, tmp_path):
    vector = tmp_path / "v"
    ends = ("--aligned", family.aligned, "--surrogate", family.surrogate)
    built = json.loads(run("vector", "build", *ends, "-o", vector, "--json")[0])
    assert built["tensors"] == 8
    assert built["fingerprint"].startswith("blake3:")
    assert json.loads(run("vector", "verify", vector, "--json")[0])["verified"] is True
    inspected = json.loads(run("vector", "inspect", vector, "--json")[0])
    assert inspected["manifest"]["scope"] == "attention"
    names = ("--task-model", family.task, "--base-model", family.base, "--safety-vector", vector)
    planned = json.loads(run("plan", *names, "-o", tmp_path / "p.json", "--json")[0])
    assert planned["merged"] == 8
    assert len(planned["kinds"]) == 4
    assert planned["kept"]["model.norm.weight"] == "not in the safety vector"
    arguments = ("--safety-vector", vector, "--plan", tmp_path / "p.json", "-o", tmp_path / "m")
    merged = json.loads(run("merge", "--task-model", family.task, *arguments, "--json")[0])
    assert merged["merged"] == 8
    assert merged["beta"] == 0.1


def test_a_plan_elsewhere_prints_the_command_that_serves_it(family, tmp_path):
    names = ("--task-model", family.task, "--base-model", family.base)
    out, _ = run("plan", *names, "--safety-vector", family.vector, "-o", tmp_path / "p.json")
    command = out.strip().splitlines()[-1].strip()
    assert command.startswith(f"vllm serve {family.task} --load-format enchtable")
    extra = json.loads(command.split("--model-loader-extra-config ")[1].strip("'"))
    assert extra["merge_plan"] == str(tmp_path / "p.json")
    assert extra["safety_vector"] == str(family.vector)


def test_refusals_are_one_message_and_exit_code_one(family, tmp_path):
    _, error = run("vector", "inspect", tmp_path, code=1)
    assert error.startswith("SafetyVectorError: safety vector ")
    names = ("--task-model", family.task, "--base-model", family.task)
    out = ("-o", tmp_path / "p.json")
    _, error = run("plan", *names, "--safety-vector", family.vector, *out, code=1)
    assert "MismatchError" in error
    assert "identical weights" in error
    assert not (tmp_path / "p.json").exists()
    _, error = run("plan", *names, "--safety-vector", family.vector, "--beta", "-1", *out, code=1)
    assert "positive, finite" in error
    _, error = run(
        "plan", *names, "--safety-vector", family.vector, "--device", "abacus", *out, code=1
    )
    assert "--device" in error


def test_output_folder_in_use_is_refused(family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    arguments = ("--safety-vector", family.vector, "--plan", family.plan, "-o", tmp_path / "out")
    _, error = run("merge", "--task-model", family.task, *arguments, code=1)
    assert "--overwrite" in error
    run("merge", "--task-model", family.task, *arguments, "--overwrite")
    assert not (tmp_path / "out" / "precious").exists()


def test_hub_task_model_needs_an_output(family, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--task"
    shutil.copytree(family.task, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ("--task-model", "org/task", "--base-model", family.base)
    _, error = execute("plan", *names, "--safety-vector", family.vector, code=1)
    assert "--output" in error
    execute("plan", *names, "--safety-vector", family.vector, "-o", tmp_path / "p.json")
    plan, _ = read_plan(tmp_path / "p.json")
    assert (plan.task_model.id, plan.task_model.revision) == ("org/task", commit)


def test_low_retained_share_warns(family, tmp_path):
    names = ("--task-model", family.task, "--base-model", family.base)
    vector = ("--safety-vector", family.vector)
    _, error = run("plan", *names, *vector, "--beta", "0.002", "-o", tmp_path / "p.json")
    assert "warning:" in error
    assert "larger beta" in error


COMMANDS = [[], ["vector"], ["vector", "build"], ["vector", "inspect"], ["vector", "verify"],
            ["vector", "sign"],
            ["distill"], ["plan"], ["merge"], ["doctor"], ["demo"],
            ["status"], ["swap"], ["rollback"], ["rollout"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(("name", "summary"), cli.COMMANDS.items())
def test_the_list_of_commands_says_what_each_says_of_itself(name, summary):
    help_text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"}).output
    assert summary in help_text


def test_help_imports_neither_torch_nor_any_command():
    """It is there at once, and where torch is not."""
    code = (
        "import sys; from typer.testing import CliRunner; from enchtable_vllm import cli\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'enchtable_vllm.cli.plan', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_wrong_usage_and_version():
    assert CliRunner().invoke(cli.app, ["plan"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["plan", "--scope", "everything"]).exit_code == 2
    assert "enchtable-vllm 0.1.0" in CliRunner().invoke(cli.app, ["--version"]).output


def test_a_signal_decides_the_exit_code_whatever_a_library_made_of_it():
    """Such as one that takes the exit for a failure of the sample that it was asking."""
    program = """
import os, signal
from enchtable_vllm import cli
from enchtable_vllm.errors import EnchTableError

def app():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        raise EnchTableError("a sample", expected="an answer", got="none", fix="Ask again.")

cli.app = app
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "stopped by SIGTERM\n"
