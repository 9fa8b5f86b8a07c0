"""Swaps beside what vLLM does by itself: its own pause, its own reload, chats; and late plans.

One server: with vLLM's development routes, a chat template, and a base model to plan with.
"""

import json

import httpx
import live
import models
import pytest
from prometheus import ours, samples

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

pytestmark = pytest.mark.usefixtures("on_sv_a")


@pytest.fixture(scope="module")
def root(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    family = models.copy_family(family, folder / "family")
    models.add_tokenizer(family.task)
    return live.make_root(family, folder)


@pytest.fixture(scope="module")
def server(root, fault, tmp_path_factory):
    variables = {
        "PYTHONPATH": str(live.FAULTS),
        "ENCHTABLE_TEST_FAULT": str(fault),
        "ENCHTABLE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "VLLM_SERVER_DEV_MODE": "1",
    }
    arguments = ("--enforce-eager", "--no-skip-tokenizer-init", "--chat-template", TEMPLATE)
    start = {"base_model": str(root.family.base)}
    log = tmp_path_factory.mktemp("log") / "log"
    with live.Live(root, log, *arguments, start=start, variables=variables) as server:
        yield server


def served(server):
    status = server.status()
    kept = {key: status[key] for key in ("active", "epoch", "weight_version", "rolls_back_to")}
    return kept, server.weights()


def refused(answer, *expected):
    status, document = answer
    assert (status, document["error"]["code"]) == expected, document


def test_generation_that_others_have_paused_is_left_to_them(server):
    before = served(server)
    assert server.http.post("/pause", params={"mode": "keep"}).status_code == 200
    try:
        refused(server.swap("sv-b"), 409, "paused_by_another")
        assert server.http.get("/is_paused").json() == {"is_paused": True}
        status = server.status()
        assert (status["state"], status["ready"]) == ("serving", False)
        assert "by no swap" in status["reason"]
        assert served(server) == before
        refused(server.rollback(), 409, "nothing_to_roll_back")
        assert server.swap("sv-b", dry_run=True)[1]["outcome"] == "dry_run"
        assert server.http.get("/is_paused").json() == {"is_paused": True}
    finally:
        assert server.http.post("/resume").status_code == 200
    tokens = server.tokens()
    server.swapped("sv-b")
    assert server.http.get("/is_paused").json() == {"is_paused": False}
    assert server.tokens() != tokens


def reload(server):
    """VLLM's own, as its development route does it."""
    merges = len(server.lines("safety vector merged: "))
    answer = server.http.post("/collective_rpc", json={"method": "reload_weights"})
    assert answer.status_code == 200, answer.text
    assert len(server.lines("safety vector merged: ")) == merges + 1


def test_a_stock_reload_yields_the_active_vector_whatever_was_tried_since(server, fault):
    server.swapped("sv-b")
    before, tokens = served(server), server.tokens()
    reload(server)
    assert (served(server), server.tokens()) == (before, tokens)

    refused(server.swap("sv-flipped"), 422, "refused")
    reload(server)
    assert (served(server), server.tokens()) == (before, tokens)

    for do in ("break", "lie"):  # before it is whole, and when it is
        fault.write_text(json.dumps({"command": "commit", "do": do}))
        refused(server.swap("sv-ffn"), 500, "undone")
        fault.unlink()
        reload(server)
        assert (served(server), server.tokens()) == (before, tokens)

    server.swapped("sv-a")  # and what it left can be swapped
    reload(server)
    assert server.rollback()[1]["to"] == "sv-b"
    assert server.weights() == before[1]


def cached(server):
    """How many plans of this server were computed, and how many found."""
    shown = samples(ours(server.http.get("/metrics").text))
    return [shown[f'enchtable_plan_cache_total{{result="{how}"}}'] for how in ("miss", "hit")]


def test_a_vector_without_a_plan_is_planned_where_it_is_swapped_in(server, root):
    """Then it is served as one that was planned ahead: `sv-unplanned` is a copy of `sv-b`."""
    vectors = {v["name"]: v for v in server.get("/v1/enchtable/vectors")[1]["vectors"]}
    assert vectors["sv-unplanned"]["planned"]
    ahead = server.swapped("sv-b")["active"]
    expected = server.weights()
    assert (ahead["beta"], ahead["plan_cache"], cached(server)) == (0.5, None, [0, 0])
    server.swapped("sv-a")
    assert server.weights() != expected
    for found in ([1, 0], [1, 1]):
        planned = server.swapped("sv-unplanned", beta=ahead["beta"])["active"]
        assert server.weights() == expected
        assert planned["norm_scale"] == ahead["norm_scale"]
        assert planned["plan_cache"] == ("hit" if found[1] else "miss")
        assert planned["plan_seconds"] > 0
        assert cached(server) == found
        server.swapped("sv-a")
    assert not root.plan("sv-unplanned").exists()


def test_a_chat_tells_the_version_it_ended_with(server):
    def chat(**options):
        body = {
            "model": str(server.command[2]),
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 4,
            **options,
        }
        response = server.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response

    for name in ("sv-b", "sv-a"):
        version = server.swapped(name)["weight_version"]
        whole = chat()
        assert whole.json()["choices"][0]["message"]["content"]
        assert whole.headers["X-Enchtable-Version"] == version
        stream = chat(stream=True)
        assert "X-Enchtable-Version" not in stream.headers
        *_, done, comment = [line for line in stream.text.splitlines() if line]
        assert (done, comment) == ("data: [DONE]", f": enchtable-version {version}")


def test_a_reload_of_other_files_under_the_same_name_is_refused(server, root):
    """Else the weights would be another vector's, and the status that of the one before."""
    server.swapped("sv-b")
    before, tokens = served(server), server.tokens()
    plan = root.plan("sv-b")
    text = plan.read_text()
    live.add_plan(root, "sv-b", beta=0.25)
    try:
        body = {"method": "reload_weights"}
        assert httpx.post(f"{server.url}/collective_rpc", json=body, timeout=60).status_code == 500
        assert (served(server), server.tokens()) == (before, tokens)
        assert any("Its files were replaced since" in line for line in server.lines("replaced"))
    finally:
        plan.write_text(text)
    reload(server)
    assert (served(server), server.tokens()) == (before, tokens)
