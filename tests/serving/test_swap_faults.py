"""Whatever goes wrong on whichever rank: all ranks serve the new vector, or all the old one.

Two ranks, one after the other made to fail by `faults/sitecustomize.py`.
"""

import json
import time

import httpx
import live
import pytest

TWO = ("--enforce-eager", "-tp", "2")


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    return live.make_root(family, tmp_path_factory.mktemp("swap"))


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    return tmp_path_factory.mktemp("fault") / "fault.json"


@pytest.fixture(scope="module")
def server(root, fault, tmp_path_factory):
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    log = tmp_path_factory.mktemp("log") / "log"
    with live.Live(root, log, *TWO, variables=variables) as server:
        yield server


def plant(fault, **keys):
    fault.write_text(json.dumps(keys))


@pytest.fixture
def before(server, fault):
    """On sv-a; nothing planted. Weights and tokens as they are then."""
    fault.unlink(missing_ok=True)
    if server.status()["active"]["safety_vector"] != "sv-a":
        server.swapped("sv-a")
    return server.weights(), server.tokens()


UNDONE = {
    "a rank breaks off half-way through its reload": {"command": "commit", "do": "break"},
    "a rank fails at once, the other has committed": {"command": "commit", "do": "raise"},
    "a rank holds other bytes than it was told to": {"command": "commit", "do": "lie"},
    "a rank fails to publish": {"command": "publish", "do": "raise"},
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", UNDONE)
def test_a_failure_on_one_rank_is_undone_on_all(server, fault, before, name, rank):
    plant(fault, rank=rank, **UNDONE[name])
    epoch = server.status()["epoch"]
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["code"]) == (500, "undone"), document
    assert f"rank {rank}" in document["error"]["message"] or "publish" in name
    status = server.status()
    assert (status["state"], status["ready"], status["disagreeing"]) == ("serving", True, 0)
    assert (status["active"]["safety_vector"], status["epoch"]) == ("sv-a", epoch)
    assert status["swaps"][0]["outcome"] == "undone"
    assert (server.weights(), server.tokens()) == before
    fault.unlink()
    server.swapped("sv-b")  # and the next one works
    assert server.weights() != before[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["stage", "poll"])
def test_a_rank_that_cannot_stage_is_known_before_anything_is_touched(
    server, fault, before, command, rank
):
    plant(fault, rank=rank, command=command, do="raise")
    answered, _ = server.swap("sv-b")
    assert answered == 422
    fault.unlink()
    assert (server.weights(), server.tokens()) == before
    server.swapped("sv-b")


def test_what_cannot_be_persisted_is_undone(server, root, before):
    (root.path / "current.json").mkdir()
    try:
        answered, document = server.swap("sv-b", persist=True)
    finally:
        (root.path / "current.json").rmdir()
    assert (answered, document["error"]["code"]) == (500, "undone")
    assert "current.json" in document["error"]["message"]
    assert (server.weights(), server.tokens()) == before


def test_where_going_back_fails_too_nothing_is_served_until_it_succeeds(server, fault, before):
    plant(fault, rank=1, command="commit|restore", do="break")
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["code"]) == (503, "failed")
    answered, ready = server.get("/enchtable/ready")
    assert (answered, ready["ready"]) == (503, False)
    assert "paused" in ready["reason"]
    assert server.status()["state"] == "failed"
    with pytest.raises(httpx.ReadTimeout):  # it waits: no answer of half-exchanged weights
        server.http.post(
            "/v1/completions",
            json={"model": str(server.command[2]), "prompt": [1, 2], "max_tokens": 1},
            timeout=2,
        )
    fault.unlink()
    server.swapped("sv-b")  # begins by going back; the lock of the failed swap is free for it
    assert server.get("/enchtable/ready")[0] == 200
    server.swapped("sv-a")
    assert (server.weights(), server.tokens()) == before


def test_what_would_not_fit_into_host_memory_is_refused(root, tmp_path):
    """The bound is the server's own; here the smallest there is."""
    log = tmp_path / "log"
    with live.Live(root, log, "--enforce-eager", start={"staging_gib": 1e-6}) as small:
        answered, document = small.swap("sv-b")
        assert (answered, document["error"]["code"]) == (507, "does_not_fit")
        assert "'staging_gib'" in document["error"]["message"]
        assert small.swap("sv-a")[1]["outcome"] == "unchanged"  # which takes none


@pytest.mark.parametrize("command", ["poll", "commit"])
def test_a_killed_worker_ends_the_server(root, fault, tmp_path, command):
    """vLLM ends it, and what starts in its place loads what it was told to."""
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    fault.unlink(missing_ok=True)
    with live.Live(root, tmp_path / "log", *TWO, variables=variables) as server:
        plant(fault, rank=1, command=command, do="exit")
        try:
            answered, document = server.swap("sv-b")
            assert (answered, document["error"]["code"]) == (503, "not_ready"), document
        except httpx.HTTPError:
            pass  # it was gone before it could answer
        deadline = time.monotonic() + 60
        while server._process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
