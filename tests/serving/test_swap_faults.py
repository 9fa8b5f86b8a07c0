"""Whatever goes wrong on whichever rank: all ranks serve the new vector, or all the old one.

Two ranks, one after the other made to fail by `faults/sitecustomize.py`.
"""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import live
import psutil
import pytest
from prometheus import lint, ours, samples

TWO = ("--enforce-eager", "-tp", "2")
#: How long a swap may be silent here: seconds.
LEASE = 5


@pytest.fixture(scope="module")
def server(root, fault, tmp_path_factory):
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "ENCHTABLE_TEST_LEASE": str(LEASE),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    log = tmp_path_factory.mktemp("log") / "log"
    with live.Live(root, log, *TWO, variables=variables) as server:
        yield server


def plant(fault, **keys):
    fault.write_text(json.dumps(keys))


@pytest.fixture
def before(server, on_sv_a):  # noqa: ARG001 (asked for what it does, not for what it gives)
    """On sv-a; nothing planted. Weights and tokens as they are then."""
    return server.weights(), server.tokens()


UNDONE = {
    "a rank breaks off half-way through its reload": {"command": "commit", "do": "break"},
    "a rank fails at once, the other has committed": {"command": "commit", "do": "raise"},
    "a rank holds other bytes than it was told to": {"command": "commit", "do": "lie"},
    "a rank fails to publish": {"command": "publish", "do": "raise"},
    "an exception that nobody foresaw": {"command": "commit", "do": "throw"},
    "another one, while it publishes": {"command": "publish", "do": "throw"},
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
    assert server.complete().headers["X-Enchtable-Version"] == status["weight_version"]
    fault.unlink()
    server.swapped("sv-b")  # and the next one works
    assert server.weights() != before[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["stage", "poll"])
@pytest.mark.parametrize("do", ["raise", "throw"])
def test_a_rank_that_cannot_stage_is_known_before_anything_is_touched(
    server, fault, before, command, rank, do
):
    plant(fault, rank=rank, command=command, do=do)
    answered, document = server.swap("sv-b")
    assert answered == 422, document
    fault.unlink()
    assert (server.weights(), server.tokens()) == before
    server.swapped("sv-b")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_stage_different_things_are_refused(server, fault, before, rank):
    plant(fault, rank=rank, command="poll", do="lie")
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["kind"]) == (422, "MismatchError"), document
    fault.unlink()
    assert (server.weights(), server.tokens()) == before


@pytest.mark.usefixtures("before")
def test_ranks_that_serve_different_things_are_not_ready(server, fault):
    plant(fault, rank=1, command="status", do="lie")
    status = server.status()
    assert (status["disagreeing"], status["ready"]) == (1, False)
    assert "1 of 2 ranks" in status["reason"]
    assert samples(ours(server.http.get("/metrics").text))["enchtable_ranks_disagreeing"] == 1
    fault.unlink()
    assert server.status()["disagreeing"] == 0


def test_a_pause_that_fails_changes_nothing(server, fault, before):
    plant(fault, command="pause", do="raise")
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["code"]) == (422, "refused"), document
    assert server.get("/enchtable/ready")[0] == 200
    assert (server.weights(), server.tokens()) == before
    fault.unlink()
    server.swapped("sv-b")


@pytest.mark.usefixtures("before")
def test_a_swap_that_is_long_in_pausing_keeps_its_lock(server, fault):
    """As one does that waits for running requests."""
    plant(fault, command="pause", do="hold")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.swap, "sv-b", pause="wait")
        try:
            while server.status()["state"] != "swapping":
                assert not first.done(), first.result()
            time.sleep(2.5 * LEASE)  # half a lease of it for staging
            refused, error = server.swap("sv-ffn")
        finally:
            fault.unlink()
        answered, document = first.result()
    assert refused == 409, (error, document)
    assert error["error"]["code"] == "swap_in_progress"
    assert (answered, document.get("outcome")) == (200, "swapped"), document
    assert document["pausing_seconds"] > 2 * LEASE
    assert server.status()["active"]["safety_vector"] == "sv-b"


@pytest.mark.parametrize("commits", [True, False])
def test_where_generation_cannot_be_resumed_it_is_said_until_it_can(server, fault, before, commits):
    plant(fault, rank=1, command="resume" if commits else "resume|commit", do="raise")
    answered, document = server.swap("sv-b")
    assert (answered, document["error"]["code"]) == (503, "failed"), document
    answered, ready = server.get("/enchtable/ready")
    assert (answered, ready["ready"]) == (503, False)
    assert "paused" in ready["reason"]
    fault.unlink()
    # Begins by bringing the other to its end; where that had put everything in, there is no more
    # to do.
    answered, document = server.swap("sv-b")
    assert (answered, document["outcome"]) == (200, "unchanged" if commits else "swapped"), document
    assert server.get("/enchtable/ready")[0] == 200
    server.swapped("sv-a")
    assert (server.weights(), server.tokens()) == before


def test_a_rank_that_cannot_finish_does_not_keep_its_lock_for_ever(server, fault, before):
    plant(fault, rank=1, command="finish", do="throw")
    server.swapped("sv-b")
    answered, document = server.swap("sv-a")
    assert (answered, document["error"]["code"]) == (409, "swap_in_progress")
    fault.unlink()
    time.sleep(1.5 * LEASE)
    server.swapped("sv-a")
    assert (server.weights(), server.tokens()) == before


def test_a_client_that_goes_away_while_a_rank_commits_changes_nothing(server, fault, before):
    plant(fault, rank=1, command="commit", do="sleep", seconds=2)
    body = {"safety_vector": "sv-b"}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/enchtable/swap", json=body, headers=live.ADMIN, timeout=1)
    deadline = time.monotonic() + 30
    while (status := server.status())["state"] == "swapping":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (status["active"]["safety_vector"], status["ready"]) == ("sv-b", True)
    fault.unlink()
    server.swapped("sv-a")
    assert (server.weights(), server.tokens()) == before


@pytest.mark.usefixtures("before")
def test_a_status_asked_while_a_swap_ends_does_not_take_its_pause_for_anothers(server, fault):
    """It asks the ranks, and then the engines: by the time of their answer the swap is done."""
    plant(fault, command="commit|is_paused", do="sleep", seconds=1)
    statuses = []
    for name in ("sv-b", "sv-a") * 3:  # of the few looks at one, all may fall beside it
        with ThreadPoolExecutor(1) as pool:
            swap = pool.submit(server.swap, name)
            while not swap.done():
                statuses.append(server.status())
        assert swap.result()[0] == 200
        if "swapping" in [status["state"] for status in statuses]:
            break
    assert "swapping" in [status["state"] for status in statuses]
    assert [status["reason"] for status in statuses if not status["ready"]] == []


def test_what_cannot_be_persisted_is_undone(server, root, before):
    (root.path / "current.json").mkdir()
    try:
        answered, document = server.swap("sv-b", persist=True)
    finally:
        (root.path / "current.json").rmdir()
    assert (answered, document["error"]["code"]) == (500, "undone")
    assert "current.json" in document["error"]["message"]
    assert (server.weights(), server.tokens()) == before


@pytest.mark.supports("metrics under tensor parallelism")
@pytest.mark.usefixtures("before")
def test_metrics_tell_of_every_rank(server, fault):
    def scraped():
        text = ours(server.http.get("/metrics").text)
        assert lint(text) == ""
        return samples(text)

    undone = 'enchtable_swaps_total{outcome="undone",phase="commit"}'
    earlier = scraped()[undone]
    plant(fault, rank=1, command="commit", do="raise")
    server.swap("sv-b")
    fault.unlink()
    answer = server.swapped("sv-b")
    shown = scraped()
    assert shown[undone] == earlier + 1
    assert (shown["enchtable_ready"], shown["enchtable_ranks_disagreeing"]) == (1, 0)
    assert shown["enchtable_epoch"] == answer["epoch"]
    assert shown["enchtable_staged_bytes"] == answer["staged_bytes"]
    assert shown['enchtable_tensors{fate="merged"}'] == answer["active"]["merged"]


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


@pytest.mark.slow
def test_what_would_not_fit_into_host_memory_is_refused(root, tmp_path):
    """The bound is the server's own; here the smallest there is."""
    log = tmp_path / "log"
    with live.Live(root, log, "--enforce-eager", start={"staging_gib": 1e-6}) as small:
        answered, document = small.swap("sv-b")
        assert (answered, document["error"]["code"]) == (507, "does_not_fit")
        assert "'staging_gib'" in document["error"]["message"]
        assert small.swap("sv-a")[1]["outcome"] == "unchanged"  # which takes none


slow = pytest.mark.slow
PHASES = ["commit", *(pytest.param(n, marks=slow) for n in ("stage", "poll", "publish", "finish"))]


@pytest.fixture
def doomed(root, fault, tmp_path):
    """A server of two ranks for one test."""
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    fault.unlink(missing_ok=True)
    with live.Live(root, tmp_path / "log", *TWO, variables=variables) as server:
        yield server


def ends(server):
    """VLLM ends it, and what starts in its place loads what it was told to."""
    deadline = time.monotonic() + 60
    while server._process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("command", PHASES)
def test_a_killed_worker_ends_the_server(doomed, fault, command):
    plant(fault, rank=1, command=command, do="exit")
    try:
        answered, document = doomed.swap("sv-b")
        if command == "finish":  # it was done, everywhere
            assert (answered, document.get("outcome")) == (200, "swapped"), document
        else:
            assert (answered, document["error"]["code"]) == (503, "not_ready"), document
    except httpx.HTTPError:
        pass  # it was gone before it could answer
    ends(doomed)


@pytest.mark.slow
def test_a_worker_killed_while_running_requests_are_waited_for_ends_the_server(doomed):
    """The pause is the engine's own: no command is on its way to a rank."""

    def run():
        many = {"n": 8, "temperature": 1.0, "ignore_eos": True}  # so that it takes long enough
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            doomed.complete(max_tokens=480, **many)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            pool.submit(run)
        time.sleep(0.2)
        swap = pool.submit(doomed.swap, "sv-b", pause="wait")
        time.sleep(1)
        assert not swap.done(), "it must still be waiting"
        family = psutil.Process(doomed.process_group).children(recursive=True)
        workers = [process for process in family if "Worker" in process.name()]
        assert len(workers) == 2
        workers[0].kill()
        with contextlib.suppress(httpx.HTTPError):
            answered, document = swap.result()
            assert (answered, document["error"]["code"]) == (503, "not_ready"), document
    ends(doomed)
