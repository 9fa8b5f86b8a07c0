"""docs/quantise.md: its commands run as they stand, on folders of the names it uses."""

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from enchtable_vllm.checkpoint import Checkpoint
from enchtable_vllm.serving.config import LoaderConfig

GUIDE = (Path(__file__).parent.parent / "docs" / "quantise.md").read_text()
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
#: vLLM's own list, read without importing vLLM.
_SOURCE = Path(find_spec("vllm").origin).parent / "model_executor/layers/quantization/__init__.py"
OFFERED = re.findall(r'^    "(\w+)",$', _SOURCE.read_text(), re.MULTILINE)


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


def test_what_it_serves_with_exists():
    """What was not run is at least what vLLM offers."""
    (serve,) = [shlex.split(line) for line in LINES if line.startswith("vllm serve ")]
    options = dict(zip(serve[3::2], serve[4::2], strict=True))
    assert options["--load-format"] == "enchtable"
    LoaderConfig.parse(json.loads(options["--model-loader-extra-config"]))
    named = set(re.findall(r"`(\w*(?:fp8|fp4|int8)\w*)`", GUIDE))
    assert options["--quantization"] in OFFERED
    assert named <= set(OFFERED)


def test_what_it_says_was_run_is_run():
    features = (Path(__file__).parent / "serving" / "test_features.py").read_text()
    (ran,) = re.findall(r"\*What was run:\* `(\w+)`", GUIDE)
    assert f'"quantization": "{ran}"' in features
