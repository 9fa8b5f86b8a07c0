"""Two data-parallel engines and two API servers behind one URL: they swap as one server does."""

import json

import live
import pytest
from prometheus import lint, ours, samples

from enchtable_vllm.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("on_sv_a")

SIDE_BY_SIDE = ("--enforce-eager", "-dp", "2", "--api-server-count", "2")


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """What one engine serves, of which `test_swap_exact` shows that it is what it should be."""
    found = {}
    log = tmp_path_factory.mktemp("alone") / "log"
    with live.Live(root, log, "--enforce-eager", start={"safety_vector": "sv-b"}) as server:
        ((found["sv-b"],),) = server.weights()
        server.swapped("sv-a")
        ((found["sv-a"],),) = server.weights()
    return found


@pytest.fixture(scope="module")
def server(root, fault, tmp_path_factory):
    """Its bound admits a swap of attention on both engines, and the whole model's on one."""
    stored = Checkpoint(root.family.task)
    parts = ("self_attn", "mlp")
    one_side = sum(stored.nbytes(n) for n in stored.tensors if any(p in n for p in parts))
    start = {"staging_gib": 3 * one_side / 2**30}
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    log = tmp_path_factory.mktemp("log") / "log"
    with live.Live(root, log, *SIDE_BY_SIDE, start=start, variables=variables) as server:
        server.ask_anew()
        yield server


@pytest.mark.supports("swapping under data parallelism (`-dp 2`), two API servers")
def test_every_engine_serves_what_a_fresh_start_does(server, alone):
    assert server.weights() == [[alone["sv-a"]]] * 2
    answer = server.swapped("sv-b")
    assert server.weights() == [[alone["sv-b"]]] * 2
    status = server.status()
    assert [engine["engine"] for engine in status["engines"]] == [0, 1]
    for engine in status["engines"]:
        (rank,) = engine["ranks"]
        assert rank["epoch"] == answer["epoch"] == status["epoch"]
        assert rank["weight_version"] == answer["weight_version"]
    tokens = {str(server.tokens()) for _ in range(8)}  # whichever engine is asked
    assert len(tokens) == 1
    server.swapped("sv-a")
    assert server.weights() == [[alone["sv-a"]]] * 2
    assert {str(server.tokens()) for _ in range(8)} != tokens


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("do", ["break", "lie"])
def test_a_failure_on_one_engine_is_undone_on_all(server, alone, fault, engine, do):
    fault.write_text(json.dumps({"engine": engine, "command": "commit", "do": do}))
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["code"]) == (500, "undone"), document
    status = server.status()
    assert (status["state"], status["ready"], status["disagreeing"]) == ("serving", True, 0)
    assert server.weights() == [[alone["sv-a"]]] * 2
    fault.unlink()
    server.swapped("sv-b")
    assert server.weights() == [[alone["sv-b"]]] * 2


def test_an_engine_that_cannot_stage_is_known_before_anything_is_touched(server, alone, fault):
    fault.write_text(json.dumps({"engine": 1, "command": "poll", "do": "raise"}))
    assert server.swap("sv-b")[0] == 422
    assert server.weights() == [[alone["sv-a"]]] * 2


def test_of_two_at_once_one_wins(server, fault):
    server.swapped_once(fault, "sv-b", clients=6)


def test_what_all_engines_of_the_machine_stage_counts(server):
    answered, document = server.swap("sv-ffn")
    assert (answered, document["error"]["code"]) == (507, "does_not_fit")
    assert "2 ranks" in document["error"]["message"]


def test_metrics_tell_of_every_engine(server):
    answer = server.swapped("sv-b")
    text = ours(server.http.get("/metrics").text)
    assert lint(text) == ""
    shown = samples(text)
    assert shown["enchtable_ranks_disagreeing"] == 0
    assert shown["enchtable_ready"] == 1
    assert shown["enchtable_epoch"] == answer["epoch"]
    assert shown["enchtable_staged_bytes"] == answer["staged_bytes"]
    active = [name for name, value in shown.items() if "active_vector_info" in name and value]
    assert len(active) == 1
    assert 'name="sv-b"' in active[0]
