"""The Grafana dashboard: its grid, topics, legends, and its queries on a real Prometheus."""

import copy
import re
from importlib.util import find_spec
from itertools import chain, combinations
from pathlib import Path

import pytest
from dashboard import BOARD, panels, queries, template_values
from prometheus import Prometheus
from prometheus_client import CollectorRegistry, start_http_server

from enchtable_vllm.demo.server import free_port
from enchtable_vllm.serving.metrics import ServerMetrics

PANELS = list(panels())
DRAWN = [panel for panel in PANELS if panel["type"] != "row"]
#: Of every series: Prometheus's own.
TARGET = {"job", "instance"}
SELECTOR = '{job=~"$job", instance=~"$instance"}'
#: What the dashboard is for, as docs/metrics.md says it, and what some panel asks for it.
TOPICS = {
    "which deployment serves which vector": [f"enchtable_active_vector_info{SELECTOR} == 1"],
    "drift": ["count by (job, name, digest)", "enchtable_desired_differs",
              "enchtable_ranks_disagreeing", "enchtable_unmerged"],
    "how well it merged": ["enchtable_retained_share_ratio", "enchtable_attenuation_ratio_bucket",
                           "enchtable_interference_bucket"],
    "swaps": ["by (outcome) (increase(enchtable_swaps_total"],
    "what they paused": ["0.5, sum by (le) (increase(enchtable_swap_paused_seconds_bucket",
                         "0.95, sum by (le) (increase(enchtable_swap_paused_seconds_bucket"],
    "refusals": ["enchtable_refused_requests_total", "enchtable_verification_failures_total"],
    "vLLM's latency": ["vllm:time_to_first_token_seconds_bucket",
                       "vllm:inter_token_latency_seconds_bucket"],
}  # fmt: skip


@pytest.fixture(scope="module")
def registry():
    made = CollectorRegistry()
    ServerMetrics(made)
    return made


@pytest.fixture(scope="module")
def labels(registry):
    """Metric, as a query names it → its labels; vLLM's have more, which no query here asks for."""
    found = {}
    for collector in registry._collector_to_names:
        (metric,) = collector.describe()
        own = {*collector._labelnames, *TARGET}
        name = metric.name + "_total" * (metric.type == "counter")
        found[name] = own
        if metric.type == "histogram":
            found[f"{name}_bucket"] = own | {"le"}
    loggers = Path(find_spec("vllm").origin).with_name("v1") / "metrics" / "loggers.py"
    for name in re.findall(r'name="(vllm:\w+)"', loggers.read_text()):
        for end in ("", "_total", "_bucket"):
            found[name + end] = TARGET | {"le"}
    return found


def targets():
    return [
        pytest.param(panel, target, id=f"{panel['title']}, {target['refId']}")
        for panel in DRAWN
        for target in panel["targets"]
    ]


def shown_labels(query, labels):
    """Of the series that a query gives."""
    if re.match(r"(sum|avg|max|min|count)\(", query):
        return set()
    grouped = re.search(r"by \(([^)]*)\)", query)
    if grouped is None:
        return labels[re.search(r"(?:enchtable_|vllm:)\w+", query)[0]]
    return set(grouped[1].split(", ")) - ({"le"} if "histogram_quantile" in query else set())


def test_each_panel_has_an_id_and_a_place_of_its_own():
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids) > 15
    for panel in PANELS:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        assert place["h"] > 0, panel["title"]
        assert (place["w"], place["h"]) == (24, 1) or panel["type"] != "row"
    inside = [panel["panels"] for panel in BOARD["panels"] if panel.get("panels")]
    for one, other in chain.from_iterable(combinations(on, 2) for on in [BOARD["panels"], *inside]):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        )  # fmt: skip
        assert apart, (one["title"], other["title"])


@pytest.mark.parametrize("topic", TOPICS)
def test_what_it_is_for_is_there(topic):
    asked = "\n".join(target["expr"] for panel in DRAWN for target in panel["targets"])
    assert not [part for part in TOPICS[topic] if part not in asked]


def test_its_topics_are_those_that_the_page_names():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    words = " ".join(page.partition("## Dashboard")[2].split()).lower()
    assert not [topic for topic in TOPICS if topic.lower() not in words]


@pytest.mark.parametrize(("panel", "target"), targets())
def test_a_query_is_of_what_was_chosen_and_its_legend_of_labels_that_are_there(
    panel, target, labels
):
    query = target["expr"]
    metrics = re.findall(r"(?:enchtable_|vllm:)\w+", query)
    assert query.count(SELECTOR) == len(metrics) >= 1  # no panel forgets a variable
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        assert set(grouped.split(", ")) <= labels[metrics[0]]
    wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert wanted <= shown_labels(query, labels)
    told_apart = len(panel["targets"]) == 1 or target["legendFormat"]
    assert told_apart
    names = {each["legendFormat"] for each in panel["targets"]}
    assert len(names) == len(panel["targets"])
    for override in panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in names


def test_an_annotation_speaks_of_labels_that_are_there(labels):
    for each in BOARD["annotations"]["list"]:
        wanted = set(re.findall(r"\{\{(\w+)\}\}", each["textFormat"]))
        assert wanted <= shown_labels(each["expr"], labels)


def test_a_collapsed_row_hides_no_panel_from_these_tests():
    """Grafana moves a collapsed row's panels into it."""
    board, folded = copy.deepcopy(BOARD), []
    for panel in board["panels"]:
        if panel["type"] == "row":
            folded.append(panel | {"collapsed": True})
        else:
            folded[-1]["panels"].append(panel)
    board["panels"] = folded
    assert sorted(queries(board)) == sorted(queries())
    assert {panel["id"] for panel in panels(board)} == {panel["id"] for panel in PANELS}


def test_prometheus_reads_every_query_and_offers_what_can_be_chosen(registry, tmp_path):
    port = free_port()
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    try:
        with Prometheus(f"http://127.0.0.1:{port}", tmp_path / "prometheus") as prometheus:
            assert prometheus.ask_until("enchtable_ready", 0) == 0
            assert template_values(prometheus) == {
                "job": ["vllm"], "instance": [f"127.0.0.1:{port}"]
            }  # fmt: skip
            for query in queries():  # one that it cannot read is an error
                prometheus.ask_all(query)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
