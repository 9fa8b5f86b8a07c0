"""``enchtable distill``: output, exit codes, the guide's commands, and two processes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.cli import distill as command
from enchtable_vllm.distill.recipe import Recipe
from enchtable_vllm.vector import SafetyVector

GUIDE = (Path(__file__).parents[2] / "docs" / "distil.md").read_text()
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
BRIEF = ["--epochs", "1", "--learning-rate", "1e-3", "--eval-share", "0.2"]


def distill(*arguments, code=0):
    """In this process: importing transformers takes longer than the training."""
    result = CliRunner().invoke(cli.app, ["distill", *map(str, arguments)])
    if code == 0:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == code or isinstance(result.exception, Exception)
    return result


def test_what_it_prints(aligned, pairs, tmp_path):
    out = tmp_path / "v"
    result = distill("--model", aligned, "--data", pairs, "-o", out, *BRIEF)
    for text in ("training loss", "held-out loss", "logit error", "tangent", "Handle it like"):
        assert text in result.stdout
    assert "24 rows: 19 pairs to train on, 5 held out" in result.stderr
    assert SafetyVector.open(out).manifest.scope == "attention"


def test_json_is_all_there_is_on_standard_output(aligned, pairs, tmp_path):
    out = tmp_path / "v"
    result = distill("--model", aligned, "--data", pairs, "-o", out, *BRIEF, "--json")
    printed = json.loads(result.stdout)
    assert printed.pop("output") == str(out)
    assert printed.pop("fingerprint") == SafetyVector.open(out).fingerprint
    assert printed == json.loads((out / "report.json").read_text())


def test_refused_in_one_message_with_every_bad_row(aligned, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text("nonsense\n" * 7)
    arguments = ["distill", "--model", aligned, "--data", data, "-o", tmp_path / "v"]
    done = subprocess.run(
        [sys.executable, "-m", "enchtable_vllm.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for line in range(1, 8):
        assert f"\nline {line}: not JSON" in "\n" + done.stderr
    assert "TrainingDataError: training data 'bad.jsonl'" in done.stderr
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    "wrong", [["--scope", "everything"], ["--linearize", "yes"], ["--epochs", "0"]], ids=" ".join
)
def test_wrong_usage(aligned, pairs, tmp_path, wrong):
    names = ["distill", "--model", aligned, "--data", pairs, "-o", tmp_path / "v", *wrong]
    assert CliRunner().invoke(cli.app, list(map(str, names))).exit_code == 2


def test_a_task_is_given_whole_or_not_at_all(aligned, pairs, tmp_path):
    names = ("--model", aligned, "--data", pairs, "-o", tmp_path / "v", "--task-model", aligned)
    assert "all three, or none" in str(distill(*names, code=1).exception)


def test_without_the_extra_it_says_what_to_install(aligned, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "enchtable_vllm.distill.run", None)
    result = distill("--model", aligned, "--data", pairs, "-o", tmp_path / "v", code=1)
    assert "pip install 'enchtable-vllm[distill]'" in str(result.exception)


def test_without_matplotlib_the_numbers_are_there(aligned, pairs, tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "v"
    result = distill("--model", aligned, "--data", pairs, "-o", out, *BRIEF)
    assert "matplotlib is not installed" in result.stderr
    assert (out / "loss.csv").is_file()
    assert not list(out.glob("*.png"))


def test_the_defaults_are_the_papers():
    """The command's, the recipe's, and the guide's."""
    paper = Recipe()
    assert (paper.pairs, paper.epochs, paper.learning_rate, paper.warmup_ratio) == (
        1000, 4, 1e-5, 0.1,
    )  # fmt: skip
    assert (paper.batch_size, paper.gradient_accumulation, paper.max_length) == (2, 4, 2048)
    assert (paper.bf16, paper.scope, paper.linearize) == (True, "attention", "none")
    defaults = command.distill.__defaults__ or ()
    names = command.distill.__code__.co_varnames[: command.distill.__code__.co_argcount]
    offered = dict(zip(names[-len(defaults) :], defaults, strict=True))
    for field in fields(Recipe):
        if field.name in offered:
            assert offered[field.name] == field.default, field.name
    for text in ("| 1000, 4 |", "| 1e-5, 0.1;", "| 2, 4 |", "| 2048 |"):
        assert text in GUIDE


@pytest.fixture
def folders(aligned, pairs, tmp_path):
    """Where the guide's reader stands."""
    from models import perturbed

    shutil.copytree(aligned, tmp_path / "aligned")
    shutil.copytree(aligned, tmp_path / "base")
    perturbed(aligned, tmp_path / "my-finetune", scale=0.01, seed=4)
    for name in ("pairs.jsonl", "task.jsonl"):
        shutil.copyfile(pairs, tmp_path / name)
    return tmp_path


def test_the_guides_commands_run_as_they_stand(folders, monkeypatch):
    monkeypatch.chdir(folders)
    commands = [shlex.split(line) for line in LINES if line.startswith("enchtable ")]
    outputs = [words[words.index("-o") + 1] for words in commands]
    assert outputs == ["./safety-vector", "./linear-vector", "./measured-vector"]
    for words in commands:
        distill(*words[2:])
    reports = [json.loads((folders / out / "report.json").read_text()) for out in outputs]
    assert [r["recipe"]["settings"]["linearize"] for r in reports] == ["none", "module", "none"]
    assert [r["disentanglement"] is None for r in reports] == [True, True, False]
    for report in reports:  # every key that the guide names is there
        for key in re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", GUIDE, re.MULTILINE):
            for name in re.findall(r"`([\w.]+)`", key):
                outer, _, inner = name.partition(".")
                assert outer in report
                if inner and report[outer] is not None:
                    assert inner in report[outer]


def test_the_guides_row_is_one(tmp_path):
    from enchtable_vllm.distill.data import read_pairs

    (row,) = [line for line in LINES if line.startswith("{")]
    (tmp_path / "pairs.jsonl").write_text(row + "\n")
    assert len(read_pairs(tmp_path / "pairs.jsonl").pairs) == 1


def test_the_guides_launches_are_what_accelerate_and_the_command_take():
    launches = [shlex.split(line) for line in LINES if line.startswith("accelerate ")]
    assert len(launches) == 2
    for words in launches:
        taken = launch_command_parser().parse_args(words[2:])
        assert (taken.module, taken.training_script) == (True, "enchtable_vllm.cli")
        assert taken.training_script_args[0] == "distill"
        help_text = CliRunner().invoke(cli.app, ["distill", "--help"], env={"COLUMNS": "200"})
        for option in taken.training_script_args[1::2]:
            assert option in help_text.output


def test_two_processes_make_one_vector(aligned, pairs, tmp_path):
    """Over gloo; the same step of four pairs as one process that accumulates two batches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no -m enchtable_vllm.cli distill"
    settings = ["--batch-size", "2", "--gradient-accumulation", "1", "--fp32", *BRIEF]
    both = tmp_path / "both"
    done = subprocess.run(
        [sys.executable, *launch.split(), "--model", str(aligned), "--data", str(pairs),
         "-o", str(both), *settings],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Handle it like the surrogate") == 1
    assert done.stderr.count("19 pairs to train on") == 1
    recipe = SafetyVector.open(both).manifest.recipe
    assert (recipe["processes"], recipe["pairs_a_step"]) == (2, 4)
    one = tmp_path / "one"
    settings[3] = "2"
    distill("--model", aligned, "--data", pairs, "-o", one, *settings, "--dtype", "fp32")
    steps = [len((v / "loss.csv").read_text().splitlines()) for v in (both, one)]
    assert steps[0] == steps[1]
    vectors = [SafetyVector.open(v) for v in (both, one)]
    assert vectors[0].manifest.norm == pytest.approx(vectors[1].manifest.norm, rel=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both", "one"]
