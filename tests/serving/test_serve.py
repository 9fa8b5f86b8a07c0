"""``vllm serve`` itself: over HTTP when all is well, and its last word when it is not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_runs import environment

from enchtable_vllm.demo.server import Server, free_port

ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "256", "--enforce-eager"]
OURS = ["--load-format", "enchtable"]
VLLM = Path(sys.executable).with_name("vllm")


@pytest.mark.supports("`vllm serve` over HTTP")
def test_the_shortest_form_serves_over_http(real_family, small_model, tmp_path):
    """No key at all: the folder carries plan and vector. Asked through the OpenAI client."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (small_model / name).exists():
            shutil.copyfile(small_model / name, real_family.task / name)
    log = tmp_path / "log"
    with Server(real_family.task, [*OURS, *ARGUMENTS], log, port=free_port()) as server:
        (answer,) = server.ask(["What is the capital of France?"], max_tokens=8)
        (line,) = server.lines("safety vector merged: ")
    assert answer
    assert re.search(
        r"120 merged, 152 kept, 0 filtered; retained share \d\.\d{3}, cosine \d\.\d{3}, "
        r"relative error \d\.\d{3}; "
        r"vector 'safety-vector' [0-9a-f]{12}, plan [0-9a-f]{12}, beta 0\.5, scope attention; "
        r"\d+\.\d\d s",
        line,
    )
    assert server._process.poll() is not None


def refused(model, *arguments):
    """Run a server that must not start; its whole output."""
    done = subprocess.run(
        [str(VLLM), "serve", str(model), *OURS, *ARGUMENTS, "--skip-tokenizer-init",
         "--port", str(free_port()), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Application startup complete" not in done.stdout
    return done.stdout


def last_word(output):
    """What stands after everything that vLLM printed."""
    # Some versions of vLLM put the process before each line.
    output = re.sub(r"^\(APIServer pid=\d+\) ", "", output, flags=re.MULTILINE)
    _, found, message = output.rpartition("\nenchtable refused to serve this model.\n")
    assert found, output[-3000:]
    assert "Traceback" not in message
    return message


@pytest.mark.refuses("a plan made for another model")
def test_a_fault_in_headers_is_the_last_word_and_no_weight_is_read(family):
    """The plan is for another model."""
    output = refused(
        family.base,
        "--model-loader-extra-config",
        f'{{"merge_plan": "{family.plan}", "safety_vector": "{family.vector}"}}',
    )
    message = last_word(output)
    assert message.startswith("MismatchError: merge plan and task model")
    assert "Make a plan for this model" in message
    assert "Loading weights" not in output


@pytest.mark.refuses("a flipped bit in the vector")
def test_a_fault_in_content_stops_the_server_before_it_is_ready(damaged):
    path = damaged.vector / "safety_vector.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    message = last_word(refused(damaged.task))
    assert message.startswith("SafetyVectorError: safety vector ")
    assert "Its bytes changed since it was built" in message


@pytest.mark.refuses("an unknown or ill-typed loader key")
def test_a_misspelt_key_is_refused_by_name(family):
    extra = '{"saftey_vector": "x"}'
    message = last_word(refused(family.task, "--model-loader-extra-config", extra))
    assert message.startswith("ConfigError: --model-loader-extra-config")
    assert "saftey_vector" in message


SPAWNS = """
import multiprocessing
from enchtable_vllm.serving.registration import register

def child():
    register()
    register()
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    loader = get_model_loader(LoadConfig(load_format="EnchTable"))
    assert type(loader).__module__ == "enchtable_vllm.serving.loader", loader

if __name__ == "__main__":
    child()
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
"""


def test_registering_twice_and_in_a_spawned_process(tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
