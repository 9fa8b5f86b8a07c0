"""docs/deploy.md and docs/runbook.md: what they tell people to type and to set is there."""

import re

import pytest
import yaml
from manifests import CHART, DEPLOY, ROOT, environment, refuse_invalid, render
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.serving.config import LoaderConfig

GUIDE = (ROOT / "docs" / "deploy.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
PROSE = re.sub(r"\s*\n\s*", " ", GUIDE + RUNBOOK)
COMMANDS = sorted(
    set(re.findall(r"(?:^|[`\s])(enchtable [a-z]+ [^`\n]*--[^`\n]*)", GUIDE + RUNBOOK))
)
YAML = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[:4]))
def test_commands_and_their_options_exist(command):
    words = command.split()
    name = words[1:3] if words[1] == "vector" else words[1:2]
    result = CliRunner().invoke(cli.app, [*name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    offered = set(re.findall(r"--[a-z][\w-]*", result.output))
    assert {w.split("=")[0] for w in words if w.startswith("--")} <= offered


def test_the_guides_tell_of_commands():
    assert len(COMMANDS) > 8, "the pattern above finds them"


@pytest.mark.parametrize("dotted", sorted(set(re.findall(r"`([a-z]\w*\.[a-zA-Z.]+)`", PROSE))))
def test_values_that_are_named_exist(dotted):
    """Those of the chart, and keys of the loader's; names of files end in something else."""
    inner = DEFAULTS | {"loader": LoaderConfig.model_fields}
    first, *rest = dotted.split(".")
    if first not in inner:
        assert rest[-1] in ("json", "yaml", "md", "env"), dotted
        return
    for key in (first, *rest):
        assert key in inner, dotted
        inner = inner[key]


def test_the_least_that_is_needed_is_enough():
    (values,) = [block for block in YAML if "model" in block]
    assert "kind: Deployment" in render(values)["enchtable-vllm/templates/deployment.yaml"]


def test_the_job_is_one_that_a_cluster_takes_and_asks_for_the_charts_own_service():
    (job,) = [block for block in YAML if block.get("kind") == "Job"]
    refuse_invalid(job)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = container["command"] + container["args"]
    (target,) = [a.partition("=")[2] for a in command if a.startswith("--targets=")]
    service = target.removeprefix("dns://").split(".")[0]
    release = service.removesuffix("-enchtable-vllm-headless")
    assert f"helm install {release} deploy/helm/enchtable-vllm" in GUIDE
    result = CliRunner().invoke(cli.app, ["rollout", "--help"], env={"COLUMNS": "200"})
    assert all(w.split("=")[0] in result.output for w in command if w.startswith("--"))
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert environment(container)["ENCHTABLE_ADMIN_TOKEN_FILE"].rpartition("/")[0] in mounts
    endings = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    fleet = (ROOT / "docs" / "fleet.md").read_text()
    assert endings == [int(n) for n in re.findall(r"^\| ([1-4]) \|", fleet, re.MULTILINE)]


def test_the_runbook_has_a_row_for_every_alert_and_no_other():
    alerts = re.findall(r"alert: (\w+)", (DEPLOY / "prometheus" / "alerts.yml").read_text())
    rows = re.findall(r'^\| <a id="(\w+)"></a>`(\w+)`', RUNBOOK, re.MULTILINE)
    assert [name for _, name in rows] == alerts
    assert all(anchor == name.lower() for anchor, name in rows)


def test_every_folder_is_in_the_guide():
    named = set(re.findall(r"`deploy/([\w-]+)", GUIDE))
    folders = {path.name for path in DEPLOY.iterdir() if path.is_dir()} - {"cpu"}
    assert folders <= named
