"""docs/quantise.md: its commands run as they stand, on folders of the names it uses."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from enchtable_vllm.checkpoint import Checkpoint

GUIDE = (Path(__file__).parent.parent / "docs" / "quantise.md").read_text()
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def folders(damaged, tmp_path):
    """Where the guide's reader stands."""
    here = tmp_path / "here"
    here.mkdir()
    damaged.plan.unlink()
    damaged.vector.rename(here / "safety-vector")
    damaged.task.rename(here / "my-finetune")
    damaged.base.rename(here / "base")
    return here


def test_its_commands_run_as_they_stand(folders):
    commands = [shlex.split(line) for line in LINES if line.startswith("enchtable ")]
    assert [command[1] for command in commands] == ["plan", "merge"]
    for command in commands:
        program = str(Path(sys.executable).with_name(command[0]))
        subprocess.run([program, *command[1:]], cwd=folders, check=True, capture_output=True)
    merged, task = (Checkpoint(folders / n) for n in ("my-finetune-safe", "my-finetune"))
    assert list(merged.tensors) == list(task.tensors)


def test_what_it_says_was_run_is_run():
    """`tests/serving/test_features.py` serves with it."""
    features = (Path(__file__).parent / "serving" / "test_features.py").read_text()
    (ran,) = re.findall(r"\*What was run:\* `(\w+)`", GUIDE)
    assert f'"quantization": "{ran}"' in features
    (serve,) = [line for line in LINES if line.startswith("vllm serve ")]
    assert "--load-format enchtable --quantization fp8_per_channel" in serve
