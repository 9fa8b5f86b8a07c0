"""``/metrics`` of real servers, and a real Prometheus that scrapes them.

Here without ``VLLM_PLUGINS``: what was loaded, as the log says it.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus import ARGUMENTS, Prometheus, lint, ours, samples

from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.plan.summary import summarize
from enchtable_vllm.serving.swap.errors import CODES

OURS = ["--load-format", "enchtable"]
LINE = re.compile(
    r"safety vector merged: (?P<merged>\d+) merged, (?P<kept>\d+) kept, (?P<filtered>\d+) filtered;"
    r" retained share (?P<retained>[\d.]+), .*; vector '(?P<name>.*)' (?P<digest>[0-9a-f]{12}), "
    r"plan (?P<plan>[0-9a-f]{12}), beta (?P<beta>[\d.]+), scope .*; (?P<seconds>[\d.]+) s$"
)


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def temporary(monkeypatch):
    """The servers' own; its path is short, because vLLM puts sockets there."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def scrape(server):
    with urlopen(f"{server.url}/metrics", timeout=30) as answer:
        return ours(answer.read().decode())


def fenced(document):
    """The lines of a document's code blocks."""
    text = (Path(__file__).parents[2] / document).read_text()
    return "".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()


def check_loaded(found, server, family):
    """What is shown is what the log and the plan say."""
    (line,) = server.lines("safety vector merged: ")
    log = LINE.search(line)
    labels = f'digest="{log["digest"]}",name="{log["name"]}",plan="{log["plan"]}"'
    served = f'enchtable_active_vector_info{{{labels},version="{log["name"]}:'
    assert [value for key, value in found.items() if key.startswith(served)] == [1]
    for fate in ("merged", "kept", "filtered"):
        assert found[f'enchtable_tensors{{fate="{fate}"}}'] == int(log[fate])
    assert f"{found['enchtable_retained_share_ratio']:.3f}" == log["retained"]
    assert f"{found['enchtable_merge_seconds']:.2f}" == log["seconds"]
    plan, digest = read_plan(family.plan)
    resolved = resolve_plan(plan, digest)
    assert found["enchtable_beta"] == resolved.beta == float(log["beta"])
    assert found["enchtable_norm_scale"] == resolved.norm_scale
    assert found["enchtable_attenuation_median_ratio"] == resolved.median_attenuation
    for kind in summarize(plan):
        labels = f'{{module="{kind.kind}"}}'
        assert found[f"enchtable_attenuation_ratio_count{labels}"] == kind.matrices
        values = [x for n, t in plan.merged.items() if kind.kind in n for x in t.interference]
        assert found[f"enchtable_interference_sum{labels}"] == pytest.approx(sum(values))
    for name, value in {"ready": 1, "unmerged": 0, "ranks_disagreeing": 0, "epoch": 0}.items():
        assert found[f"enchtable_{name}"] == value


@pytest.mark.supports("metrics of loading without `VLLM_PLUGINS`, one API server and several")
@pytest.mark.parametrize("api_servers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_was_loaded_is_scraped_without_vllm_plugins(family, tmp_path, temporary, api_servers):
    arguments = [*OURS, *ARGUMENTS, "--api-server-count", str(api_servers)]
    with Server(family.task, arguments, tmp_path / "log", port=free_port()) as server:
        text = scrape(server)
        found = samples(text)
        check_loaded(found, server, family)
        assert lint(text) == ""
        with Prometheus(server.url, tmp_path / "prometheus") as prometheus:
            for query, value in (
                ('enchtable_tensors{fate="merged"}', found['enchtable_tensors{fate="merged"}']),
                ("enchtable_active_vector_info == 1", 1),
                ("sum(enchtable_attenuation_ratio_bucket{le='+Inf'})", 8),
                ("enchtable_merged_bytes", found["enchtable_merged_bytes"]),
                ("count(enchtable_refused_requests_total)", len(CODES) + 1),  # and 'other'
            ):
                assert prometheus.ask_until(query, value) == value, query
            alerts = fenced("docs/metrics.md")
            assert len(alerts) == 2
            for alert in alerts:
                assert prometheus.ask(alert) is None, alert
        (command,) = [line for line in fenced("README.md") if line.endswith("grep ^enchtable_")]
        command = command.replace("localhost:8000", server.url)
        shown = subprocess.check_output(["bash", "-c", command], text=True)
        assert samples(shown).keys() == found.keys()
        assert server.lines("/metrics has what 1 rank(s) loaded")
        assert list(temporary.glob("enchtable-*.records/*.json"))
    assert not list(temporary.glob("enchtable-*"))


@pytest.mark.slow
def test_a_server_that_did_not_ask_shows_nothing_and_says_nothing(family, tmp_path):
    """The stat logger is made there too."""
    with Server(family.task, ARGUMENTS, tmp_path / "log", port=free_port()) as server:
        assert scrape(server) == ""
        assert not server.lines("vllm.enchtable")
        assert not server.lines("/metrics has")
