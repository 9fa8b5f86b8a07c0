"""Every command line of deploy/ is one that vLLM takes, and its loader config one that we take."""

import json
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY, VALUES, documents, only, pod_of, production_stack

from enchtable_vllm.serving.config import LoaderConfig


def of_chart(case):
    container = pod_of(only(documents(case), "Deployment"))["containers"][0]
    return container["command"] + container["args"]


def of_compose():
    """With the values of the example; the image's own entry point comes first."""
    example = (DEPLOY / "compose" / "example.env").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    text = (DEPLOY / "compose" / "compose.yaml").read_text()

    def value(match):
        return values.get(match[1]) or match[2].removeprefix(":-")

    filled = re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", value, text)
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[1])
    return entry + yaml.safe_load(filled)["services"]["vllm"]["command"]


def of_kserve():
    """The runtime's arguments, and after them, as KServe adds them, the service's."""
    runtime = yaml.safe_load((DEPLOY / "kserve" / "servingruntime.yaml").read_text())
    service = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    args = [a.replace("{{.Name}}", service["metadata"]["name"]) for a in container["args"]]
    return container["command"] + args + service["spec"]["predictor"]["model"]["args"]


def of_production_stack():
    """What its chart makes of these values."""
    (container,) = production_stack()["containers"]
    return container["command"]


#: Whose command line it is, and what makes it.
COMMANDS = {f"chart, {case}": partial(of_chart, case) for case in VALUES} | {
    "compose": of_compose,
    "kserve": of_kserve,
    "production stack": of_production_stack,
}


@pytest.fixture(scope="module")
def serve():
    """A command line → what 'vllm serve' makes of it, with its own parser and its own checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what vLLM imports, which is not ours to mend
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.cli.serve import cmd_init
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))

    def parse(words):
        program, *arguments = words
        assert program == "vllm"
        parsed = parser.parse_args(arguments)
        command.validate(parsed)
        return parsed, AsyncEngineArgs.from_cli_args(parsed).create_load_config()

    return parse


@pytest.mark.parametrize("name", COMMANDS)
def test_vllm_takes_the_command_line(serve, name):
    parsed, load = serve(COMMANDS[name]())
    assert parsed.model_tag.startswith(("/", "my-org/"))
    assert load.load_format == "enchtable"
    assert parsed.host == "0.0.0.0" or name == "compose"  # vLLM's own default is all interfaces
    LoaderConfig.parse(load.model_loader_extra_config)


def test_the_loaders_keys_arrive_as_they_were_given(serve):
    _, load = serve(COMMANDS["chart, everything"]())
    given = VALUES["everything"]["loader"] | {"safety_vector": "sv-a", "vector_root": "/vectors"}
    assert load.model_loader_extra_config == given
    _, load = serve(COMMANDS["chart, minimal"]())
    assert load.model_loader_extra_config == {}


def test_a_wrong_argument_would_be_noticed(serve, capsys):
    with pytest.raises(SystemExit):
        serve([*COMMANDS["compose"](), "--no-such-option=1"])
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--no-such-option"]], ids=["as it is", "wrong"])
def test_downloads_are_a_command_of_the_hubs_client(extra, tmp_path):
    """Offline it gets as far as asking the Hub; a wrong command does not."""
    (download,) = pod_of(only(documents("hub"), "Deployment"))["initContainers"]
    program, *words = download["command"]
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *words, *extra],
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert ("offline" in done.stderr.lower()) == (not extra), done.stderr
    assert ("no such option" in done.stderr.lower()) == bool(extra), done.stderr
    commit = VALUES["hub"]["vectors"]["download"][0]["commit"]
    assert words[words.index("--revision") + 1] == commit
