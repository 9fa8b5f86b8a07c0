"""`ServerMetrics`: what a scrape shows, with one process and with several; and the records."""

import json
import math
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus import lint, samples
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from enchtable_vllm.serving import metrics, records
from enchtable_vllm.serving.metrics import KINDS, REASONS, ServerMetrics

ROOT = Path(__file__).parent.parent


def status(name="sv-a", epoch=0, **more):
    """A status document; keys of ``active`` and of itself may be changed."""
    none = name == "@none"
    active = {
        "safety_vector": name,
        "vector_digest": None if none else f"blake3:{name.encode().hex():0<64}",
        "plan_digest": None if none else "blake3:" + "a" * 64,
        "beta": None if none else 0.5,
        "norm_scale": None if none else 1.9,
        "merged": 0 if none else 3,
        "kept": None if none else 5,
        "filtered": 1,
        "refused": 0,
        "retained_share": None if none else 0.99,
        "attenuation_median": None if none else 0.93,
        "seconds": 0.21,
        "merged_bytes": 53084160,
        "plan_seconds": None,
        "plan_cache": None,
    }
    modules = {"self_attn.q_proj": {"attenuation": [0.5, 0.93], "interference": [0.7, 0.07]}}
    document = {
        "state": "serving",
        "ready": True,
        "reason": None,
        "weight_version": f"{name}:0d1e",
        "epoch": epoch,
        "desired": None,
        "as_desired": None,
        "disagreeing": 0,
        "swaps": [],
        "engines": [],
        "modules": {} if none else modules,
    }
    for key, value in more.items():
        (active if key in active else document)[key] = value
    return document | {"active": active}


def record(outcome="swapped", phase="done", **more):
    return {
        "epoch": 1, "from": "sv-a", "to": "sv-b", "outcome": outcome, "phase": phase,
        "began": "2026-01-01T12:00:00Z", "staging_seconds": 0.41,
        "pausing_seconds": 0.04, "paused_seconds": 0.09,
        "swap_seconds": 0.55, "reason": None,
    } | more  # fmt: skip


class OneProcess:
    """Metrics in a registry of their own, and what they show."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.metrics = ServerMetrics(self.registry)

    def text(self):
        return generate_latest(self.registry).decode()

    def samples(self):
        return samples(self.text())

    def active(self):
        return active(self.samples())


def active(found):
    """Names of the vectors whose label set is 1."""
    rows = {k: v for k, v in found.items() if k.startswith("enchtable_active_vector_info")}
    assert set(rows.values()) <= {0.0, 1.0}
    return [re.search(r'name="([^"]*)"', key)[1] for key, value in rows.items() if value]


@pytest.fixture
def one(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return OneProcess()


def test_a_status_becomes_its_numbers(one):
    one.metrics.serving(status(plan_cache="miss", plan_seconds=2.5, as_desired=False))
    found = one.samples()
    digest = f"{b'sv-a'.hex():0<12}"
    labels = f'digest="{digest}",name="sv-a",plan="{"a" * 12}",version="sv-a:0d1e"'
    expected = {
        f"enchtable_active_vector_info{{{labels}}}": 1,
        "enchtable_ready": 1,
        "enchtable_unmerged": 0,
        "enchtable_desired_differs": 1,
        "enchtable_ranks_disagreeing": 0,
        "enchtable_epoch": 0,
        'enchtable_tensors{fate="merged"}': 3,
        'enchtable_tensors{fate="kept"}': 5,
        'enchtable_tensors{fate="filtered"}': 1,
        'enchtable_tensors{fate="refused"}': 0,
        "enchtable_retained_share_ratio": 0.99,
        "enchtable_beta": 0.5,
        "enchtable_norm_scale": 1.9,
        "enchtable_attenuation_median_ratio": 0.93,
        "enchtable_merge_seconds": 0.21,
        "enchtable_merged_bytes": 53084160,
        "enchtable_plan_seconds": 2.5,
        'enchtable_plan_cache_total{result="miss"}': 1,
        'enchtable_plan_cache_total{result="hit"}': 0,
        'enchtable_attenuation_ratio_bucket{le="0.5",module="self_attn.q_proj"}': 1,
        'enchtable_attenuation_ratio_bucket{le="0.95",module="self_attn.q_proj"}': 2,
        'enchtable_attenuation_ratio_count{module="self_attn.q_proj"}': 2,
        'enchtable_interference_sum{module="self_attn.q_proj"}': 0.77,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_one_label_set_is_active_however_often_it_changes(one):
    for epoch, name in enumerate(["sv-a", "sv-b", "sv-a", "@none", "sv-c"]):
        one.metrics.serving(status(name, epoch))
        assert one.active() == [name]
    assert len([k for k in one.samples() if k.startswith("enchtable_active_vector_info")]) == 1


def test_no_vector_is_unmerged_and_has_no_numbers(one):
    one.metrics.serving(status())
    one.metrics.serving(status("@none", 1))
    found = one.samples()
    assert found["enchtable_unmerged"] == 1
    assert math.isnan(found["enchtable_beta"])
    assert math.isnan(found["enchtable_retained_share_ratio"])
    one.metrics.serving(status("sv-b", 2))
    assert one.samples()["enchtable_unmerged"] == 0


def test_a_merge_is_counted_once_however_often_it_is_seen(one):
    count = 'enchtable_attenuation_ratio_count{module="self_attn.q_proj"}'
    for _ in range(3):
        one.metrics.serving(status())
    assert one.samples()[count] == 2
    one.metrics.serving(status("sv-b", 1))
    assert one.samples()[count] == 4


def test_a_failed_server_and_ranks_that_disagree(one):
    one.metrics.serving(status(ready=False, state="failed", disagreeing=1))
    found = one.samples()
    assert (found["enchtable_ready"], found["enchtable_ranks_disagreeing"]) == (0, 1)


def test_ranks_that_do_not_answer_are_not_ready(one):
    one.metrics.serving(status())
    one.metrics.silent()
    assert one.samples()["enchtable_ready"] == 0
    assert one.active() == ["sv-a"]


def test_swaps_are_counted_by_outcome_and_timed(one):
    one.metrics.swapped(record(staged_bytes=7))
    one.metrics.swapped(record("refused", "stage", paused_seconds=0.0, swap_seconds=None))
    one.metrics.swapped(record("exploded", "midway", staging_seconds=None))
    found = one.samples()
    assert found['enchtable_swaps_total{outcome="swapped",phase="done"}'] == 1
    assert found['enchtable_swaps_total{outcome="refused",phase="stage"}'] == 1
    assert found['enchtable_swaps_total{outcome="other",phase="other"}'] == 1
    assert found['enchtable_swaps_total{outcome="undone",phase="commit"}'] == 0
    assert found["enchtable_swap_staging_seconds_count"] == 2
    assert found['enchtable_swap_paused_seconds_bucket{le="0.1"}'] == 2
    assert found['enchtable_swap_paused_seconds_bucket{le="0.05"}'] == 0
    assert found["enchtable_swap_pausing_seconds_sum"] == pytest.approx(3 * 0.04)
    assert found["enchtable_staged_bytes"] == 7


def test_reasons_and_kinds_are_a_bounded_set(one):
    for code in ("no_plan", "no_plan", "made_up", "made\nup"):
        one.metrics.refused(code)
    one.metrics.verification_failed("MismatchError")
    one.metrics.verification_failed("KeyError")
    found = one.samples()
    assert found['enchtable_refused_requests_total{reason="no_plan"}'] == 2
    assert found['enchtable_refused_requests_total{reason="other"}'] == 2
    assert found['enchtable_verification_failures_total{kind="MismatchError"}'] == 1
    assert found['enchtable_verification_failures_total{kind="other"}'] == 1
    text = (ROOT / "docs" / "http-api.md").read_text()
    assert sorted(re.findall(r"^\| \d{3} \| `(\w+)` \|", text, re.MULTILINE)) == sorted(REASONS)
    assert "SafetyVectorError" in KINDS
    assert "EnchTableError" not in KINDS


def test_kinds_of_module_are_bounded(one):
    numbers = {"attenuation": [0.5], "interference": [0.7]}
    one.metrics.serving(status(modules={f"odd.{i:03}": numbers for i in range(100)}))
    found = one.samples()
    rows = [k for k in found if k.startswith("enchtable_interference_count")]
    assert len(rows) == 33
    assert found['enchtable_interference_count{module="other"}'] == 68


def test_what_cannot_be_shown_is_logged_and_harms_nobody(one, caplog):
    one.metrics.serving({"active": {}})
    assert "could not be set" in caplog.text


def test_metrics_are_made_once_in_a_process():
    assert metrics.shared() is metrics.shared()


def test_promtool_finds_nothing_to_complain_about(one):
    one.metrics.serving(status(plan_cache="hit", plan_seconds=0.01))
    one.metrics.swapped(record(staged_bytes=7))
    assert lint(one.text()) == ""


def test_the_documentation_lists_every_metric(one):
    """Name, type and labels."""
    of_code = {
        own.name + "_total" * (own.type == "counter"): (own.type, metric._labelnames)
        for metric in one.registry._collector_to_names
        for own in metric.describe()
    }
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(enchtable_\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    of_text = {name: (kind, tuple(re.findall(r"`(\w+)`", row))) for name, kind, row in rows}
    assert of_text == of_code
    assert len(of_text) == len(rows)


PROCESS = """
import json, sys
from enchtable_vllm.serving.metrics import ServerMetrics
metrics = ServerMetrics()
print("ready", flush=True)
for line in sys.stdin:
    method, *arguments = json.loads(line)
    getattr(metrics, method)(*arguments)
    print("done", flush=True)
"""


class ApiServer:
    """A real process that keeps its metrics in files, as one of several API servers does."""

    def __init__(self, folder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        )  # fmt: skip

    def started(self):
        while (line := self._process.stdout.readline()) != "ready\n":
            assert line, "it ended"
        return self

    def call(self, *words):
        print(json.dumps(words), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"

    def stop(self):
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


@pytest.fixture
def two(tmp_path):
    servers = [ApiServer(tmp_path), ApiServer(tmp_path)]
    yield [server.started() for server in servers]
    for server in servers:
        server.stop()


def test_two_api_servers_show_one_truth(two, tmp_path):
    """Each sets gauges at start and after its own swaps, and does not hear of the other's."""

    def scrape():
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(tmp_path))
        return generate_latest(registry).decode()

    a, b = two
    count = 'enchtable_attenuation_ratio_count{module="self_attn.q_proj"}'
    for server in two:
        server.call("serving", status("sv-a", 0, plan_cache="hit", plan_seconds=0.1))
    found = samples(scrape())
    assert active(found) == ["sv-a"]
    assert found[count] == 2
    assert found['enchtable_plan_cache_total{result="hit"}'] == 1
    # The second swap is where its own memory would fail A, which knows of sv-a only.
    swaps = [(b, "sv-b"), (a, "sv-c"), (b, "@none"), (a, "sv-b")]
    for epoch, (server, name) in enumerate(swaps, start=1):
        server.call("swapped", record())
        server.call("serving", status(name, epoch))
        found = samples(scrape())
        assert active(found) == [name]
        assert found["enchtable_epoch"] == epoch
        assert found["enchtable_unmerged"] == (name == "@none")
        assert found['enchtable_swaps_total{outcome="swapped",phase="done"}'] == epoch
        assert found["enchtable_swap_seconds_count"] == epoch
    assert found[count] == 2 * 4
    b.call("serving", status("sv-b", 4, ready=False))
    found = samples(scrape())
    assert (found["enchtable_ready"], found[count]) == (0, 8)
    for server in two:
        server.call("refused", "no_plan")
        server.call("verification_failed", "MismatchError")
    found = samples(scrape())
    assert found['enchtable_refused_requests_total{reason="no_plan"}'] == 2
    assert found['enchtable_verification_failures_total{kind="MismatchError"}'] == 2
    assert lint(scrape()) == ""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "records"
    monkeypatch.setenv("ENCHTABLE_RECORDS", str(path))
    return path


def test_a_record_is_private_whole_and_replaced(folder):
    assert records.read() == []
    records.leave({"merged": 1})
    records.leave({"merged": 2})
    assert records.read() == [{"merged": 2}]
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.usefixtures("folder")
def test_each_process_has_its_record():
    processes = [
        multiprocessing.get_context("spawn").Process(target=records.leave, args=({"rank": i},))
        for i in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(r["rank"] for r in records.read()) == [0, 1]


def test_a_record_that_cannot_be_left_is_not_left(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENCHTABLE_RECORDS", str(tmp_path / "file"))
    records.leave({"merged": 1})
    monkeypatch.delenv("ENCHTABLE_RECORDS")
    records.leave({"merged": 1})
    assert records.read() == []


INSTALLS = """
import os
from enchtable_vllm.serving import records
records.install(); folder = os.environ["ENCHTABLE_RECORDS"]
records.install(); assert os.environ["ENCHTABLE_RECORDS"] == folder
records.leave({"merged": 1}); assert os.path.isdir(folder)
print(folder)
"""


def test_the_folder_goes_with_the_process_that_chose_it(monkeypatch):
    monkeypatch.setenv("ENCHTABLE_RECORDS", "/inherited/from/elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", INSTALLS], capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("enchtable-")
    assert not folder.exists()
