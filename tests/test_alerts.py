"""The alert rules, by promtool's own unit tests; and they speak of metrics that exist."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus import program
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.serving.metrics import OUTCOMES, REASONS, ServerMetrics

ROOT = Path(__file__).parent.parent
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
CASES = Path(__file__).parent / "alerts" / "alerts.test.yml"
TEXT = RULES.read_text()
ALERTS = re.findall(r"alert: (\w+)", TEXT)


def promtool(*arguments):
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_what_prometheus_reads():
    promtool("check", "rules", RULES)


def test_each_fires_when_it_should_and_not_before():
    promtool("test", "rules", CASES)


def test_every_rule_is_seen_to_fire():
    cases = CASES.read_text()
    seen = set(re.findall(r'alertname="(\w+)", alertstate="firing"', cases))
    seen |= set(re.findall(r"alertname: (\w+)\n +eval_time: \d+m\n +exp_alerts:\n", cases))
    assert seen == set(ALERTS)


def test_rules_speak_of_metrics_and_labels_that_exist():
    registry = CollectorRegistry()
    ServerMetrics(registry)
    exposed = generate_latest(registry).decode()
    names = set(re.findall(r"^# TYPE (enchtable_\w+)", exposed, re.MULTILINE))
    expressions = re.findall(r"expr: (.*)", TEXT)
    used = set(re.findall(r"enchtable_\w+", " ".join(expressions)))
    assert used <= names
    theirs = set(re.findall(r"vllm:\w+", " ".join(expressions)))
    loggers = Path(find_spec("vllm").origin).with_name("v1") / "metrics" / "loggers.py"
    assert theirs <= set(re.findall(r'name="(vllm:\w+)"', loggers.read_text()))
    outcomes = re.search(r'outcome=~"([\w|]+)"', TEXT)[1].split("|")
    reasons = re.search(r'reason=~"([\w|]+)"', TEXT)[1].split("|")
    assert set(outcomes) <= set(OUTCOMES)
    assert set(reasons) <= set(REASONS)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"'enchtable ([^']+)'", TEXT))))
def test_what_whoever_is_woken_is_told_to_type_exists(command):
    words = re.sub(r"\{\{[^}]*\}\}", "x", command).split()
    name = words[:2] if words[0] == "vector" else words[:1]
    result = CliRunner().invoke(cli.app, [*name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    offered = set(re.findall(r"--[\w-]+", result.output))
    assert {word for word in words if word.startswith("--")} <= offered
