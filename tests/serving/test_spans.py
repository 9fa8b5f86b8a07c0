"""Spans: a real collector that real servers send to, and nothing where nobody traces."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live import Live
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from vllm_runs import environment


class Collector:
    """Takes OTLP over HTTP on loopback; gives the spans, each with its attributes."""

    def __init__(self):
        self.spans = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def wait_for(self, *names, many=1, seconds=30):
        deadline = time.monotonic() + seconds
        while any(len(self.named(name)) < many for name in names):
            assert time.monotonic() < deadline, {span.name for span in self.spans}
            time.sleep(0.2)


@pytest.fixture(scope="module")
def collector(root, tmp_path_factory):
    """What a server sent that loaded one vector, swapped to another and refused a third."""
    log = tmp_path_factory.mktemp("log") / "log"
    http = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with Collector() as collector:
        arguments = ["--enforce-eager", "--otlp-traces-endpoint", collector.url]
        with Live(root, log, *arguments, variables=http) as server:
            server.swapped("sv-b")
            assert server.swap("sv-unplanned")[0] == 422
            # A stopped worker may be killed before it has sent what it holds back.
            collector.wait_for("enchtable.load", "enchtable.prepare", "Loading (CPU)")
            collector.wait_for("enchtable.swap", many=2)
    return collector


def test_loading_is_traced_inside_vllms_own_span(collector, family):
    (load,), (prepare,) = collector.named("enchtable.load"), collector.named("enchtable.prepare")
    by_id = {span.span_id: span for span in collector.spans}
    assert prepare.parent_span_id == load.span_id
    assert by_id[load.parent_span_id].name.startswith("Loading")
    assert load.start_time_unix_nano <= prepare.start_time_unix_nano
    assert prepare.end_time_unix_nano <= load.end_time_unix_nano
    attributes = {a.key: a.value for a in load.attributes}
    assert attributes["enchtable.model"].string_value == str(family.task)
    assert attributes["enchtable.draft"].bool_value is False


def test_a_swap_is_traced_by_the_api_server_that_was_asked(collector):
    done, refused = (
        {a.key.removeprefix("enchtable."): a.value.string_value for a in span.attributes}
        for span in collector.named("enchtable.swap")
    )
    assert {k: done[k] for k in ("from", "to", "outcome", "phase")} == {
        "from": "sv-a", "to": "sv-b", "outcome": "swapped", "phase": "done",
    }  # fmt: skip
    assert (refused["outcome"], refused["phase"], refused["code"]) == (
        "refused",
        "stage",
        "no_plan",
    )


IN_MEMORY = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from enchtable_vllm.serving.spans import span

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
with span("enchtable.early", lost=True):  # before there is a provider
    pass
trace.set_tracer_provider(provider)
try:
    with span("enchtable.swap", to="sv-b", beta=None) as found:
        found["paused_seconds"] = 0.5
        raise ValueError("no")
except ValueError:
    pass
(one,) = exporter.get_finished_spans()
assert (one.name, dict(one.attributes)) == (
    "enchtable.swap", {"enchtable.to": "sv-b", "enchtable.paused_seconds": 0.5}
), one
assert one.status.status_code is trace.StatusCode.ERROR
assert [event.name for event in one.events] == ["exception"]
"""

WITHOUT = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed

from enchtable_vllm.serving.spans import span

with span("enchtable.load", model="m") as found:
    found["merged"] = 1
try:
    with span("enchtable.load"):
        raise ValueError("no")
except ValueError:
    pass
else:
    raise AssertionError("swallowed")
"""


@pytest.mark.parametrize("script", [IN_MEMORY, WITHOUT], ids=["traced", "not installed"])
def test_a_span_tells_what_was_found_and_lets_errors_through(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
