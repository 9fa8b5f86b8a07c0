"""The HTTP interface of swapping, on a real server: who may do what, and what is answered."""

import json
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import live
import pytest

SLOWLY = 3.0
pytestmark = pytest.mark.usefixtures("on_sv_a")

KEY = {"Authorization": "Bearer inference-key"}
OUTLASTING = 2000  # tokens of which no machine is so fast that a swap did not come in between


@pytest.fixture(scope="module")
def server(root, fault, tmp_path_factory):
    """With an API key, an admin token, and two API servers before one engine."""
    variables = {"PYTHONPATH": str(live.FAULTS), "ENCHTABLE_TEST_FAULT": str(fault)}
    log = tmp_path_factory.mktemp("log") / "log"
    arguments = (
        "--enforce-eager", "--api-server-count", "2", "--api-key", "inference-key",
        "--max-model-len", str(OUTLASTING + 8),
    )  # fmt: skip
    with live.Live(root, log, *arguments, variables=variables) as server:
        server.ask_anew()
        server.http.headers.update(KEY)
        yield server


ROUTE = re.compile(r"(/v1)?/enchtable/")
WRONG = {"X-Enchtable-Admin-Token": "open-sesame-open-sesam3"}
#: So that whoever is let in changes nothing; a route that is not here gets an empty object.
BODIES = {
    "/v1/enchtable/swap": {"safety_vector": "sv-b", "dry_run": True},
    "/v1/enchtable/rollback": {"expected_epoch": 10**6},
}


def routes(server):
    """Every route of ours that there is: method, path, and what OpenAPI tells of it."""
    paths = server.http.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path, told)
        for path, methods in paths.items()
        if ROUTE.match(path)
        for method, told in methods.items()
    ]


def documented_routes():
    """Method, path → whose credentials it wants."""
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    rows = re.findall(r"^\| `(GET|POST) (\S+)` \| (.*?) \|", page, re.MULTILINE)
    return {(method, path): who for method, path, who in rows}


def test_every_route_with_every_kind_of_credentials(server):
    """Whoever changes something needs both secrets, whoever reads under /v1 the API key."""

    def asked(method, path, **headers):
        body = BODIES.get(path, {}) if method == "POST" else None
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.request(method, path, headers=headers, json=body)
        try:
            code = answer.json()["error"]["code"]
        except (LookupError, TypeError, ValueError):
            code = None
        return answer.status_code, code

    found = {(method, path) for method, path, _ in routes(server)}
    documented = documented_routes()
    assert found == documented.keys()
    for method, path in sorted(found):
        if documented[method, path] == "none":
            assert asked(method, path) == (200, None), path
            continue
        for headers in ({}, live.ADMIN, {"Authorization": "Bearer another"}):  # none the API key
            assert asked(method, path, **headers)[0] == 401, path
        if method == "GET":
            assert documented[method, path] == "API key"
            assert asked(method, path, **KEY) == (200, None), path
            continue
        assert documented[method, path] == "admin"
        assert asked(method, path, **KEY) == (401, "admin_token_missing"), path
        assert asked(method, path, **KEY, **WRONG) == (403, "admin_token_wrong"), path
        let_in = (409, "wrong_epoch") if path.endswith("/rollback") else (200, None)
        assert asked(method, path, **KEY, **live.ADMIN) == let_in, path
    log = server.log.read_text()
    assert live.TOKEN not in log
    assert WRONG["X-Enchtable-Admin-Token"] not in log


def test_the_interface_is_on_the_openapi_page(server):
    told = {path: operation for _, path, operation in routes(server)}
    assert all(operation["summary"] for operation in told.values())
    swap = told["/v1/enchtable/swap"]
    schema = swap["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {
        "safety_vector", "beta", "pause", "dry_run", "persist", "expected_epoch",
        "timeout_seconds",
    }  # fmt: skip
    assert swap["parameters"][0]["name"] == "X-Enchtable-Admin-Token"
    assert "swap_in_progress" in swap["responses"]["409"]["description"]


def shown(route):
    """The answer that docs/http-api.md has below a route: `…`, `or null` and the like taken out."""
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    section = page.partition(f"\n## `{route}`\n")[2].partition("\n## ")[0]
    (answer,) = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return json.loads(re.sub(r" or (null|true)", "", answer).replace("{…}", "null"))


def assert_same_keys(shown, real, where):
    """At every depth, where neither leaves it out."""
    if isinstance(shown, dict) and isinstance(real, dict):
        assert shown.keys() == real.keys(), where
        for key in shown:
            assert_same_keys(shown[key], real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        for one in real:
            assert_same_keys(shown[0], one, f"{where}[]")


def test_the_documented_answers_have_the_keys_of_the_real_ones(server):
    real = {
        "POST /v1/enchtable/swap": server.swapped("sv-b"),
        "GET /v1/enchtable/status": server.status(),
        "GET /v1/enchtable/vectors": server.http.get("/v1/enchtable/vectors").json(),
    }
    assert real["GET /v1/enchtable/status"]["swaps"]
    for route, answer in real.items():
        assert_same_keys(shown(route), answer, route)


BAD = {
    "no vector": ({}, 422, "invalid_request"),
    "unknown key": ({"safety_vector": "sv-b", "bta": 1}, 422, "invalid_request"),
    "negative beta": ({"safety_vector": "sv-b", "beta": -0.1}, 422, "invalid_request"),
    "zero beta": ({"safety_vector": "sv-b", "beta": 0}, 422, "invalid_request"),
    "beta as text": ({"safety_vector": "sv-b", "beta": "1"}, 422, "invalid_request"),
    "unknown pause": ({"safety_vector": "sv-b", "pause": "never"}, 422, "invalid_request"),
    "unknown vector": ({"safety_vector": "sv-z"}, 404, "unknown_vector"),
    "a path": ({"safety_vector": "/etc"}, 404, "unknown_vector"),
    "a way out": ({"safety_vector": "../root/sv-b"}, 404, "unknown_vector"),
    "a dot": ({"safety_vector": "."}, 404, "unknown_vector"),
    "a repository": ({"safety_vector": "org/name@" + "a" * 40}, 404, "unknown_vector"),
    "no plan": ({"safety_vector": "sv-unplanned"}, 422, "no_plan"),
    "flipped bit": ({"safety_vector": "sv-flipped"}, 422, "refused"),
    "not finite": ({"safety_vector": "sv-nan"}, 422, "refused"),
    "another epoch": ({"safety_vector": "sv-b", "expected_epoch": 999}, 409, "wrong_epoch"),
    "no current.json": ({"safety_vector": "@current"}, 422, "refused"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(server, name):
    body, status, code = BAD[name]
    before, tokens = server.status(), server.tokens()
    answered, document = server.post("/v1/enchtable/swap", body)
    assert (answered, document["error"]["code"]) == (status, code), document
    assert document["error"]["message"]
    after = server.status()
    for key in ("active", "epoch", "weight_version", "rolls_back_to", "ready"):
        assert after[key] == before[key]
    assert server.tokens() == tokens


@pytest.mark.parametrize("beta", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_finite_is_no_beta(server, beta):
    before = server.status()["epoch"]
    content = f'{{"safety_vector": "sv-b", "beta": {beta}}}'
    answer = server.http.post("/v1/enchtable/swap", content=content, headers=live.ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert "beta" in answer.json()["error"]["message"]
    assert server.status()["epoch"] == before


def test_what_is_missing_is_named_with_its_command(server, root):
    _, document = server.swap("sv-unplanned")
    fix = document["error"]["fix"]
    assert fix.startswith("enchtable plan --task-model ")
    assert fix.endswith(f"-o {root.plan('sv-unplanned')}")


def test_a_link_out_of_the_root_is_no_vector(server, root):
    link = root.path / "sv-link"
    link.symlink_to(root.family.vector)
    try:
        answered, document = server.swap("sv-link")
    finally:
        link.unlink()
    assert (answered, document["error"]["code"]) == (404, "unknown_vector")
    assert "a link out of it" in document["error"]["message"]


def test_swap_and_rollback(server):
    weights, tokens, version = server.weights(), server.tokens(), server.status()["weight_version"]
    epoch = server.status()["epoch"]
    answer = server.swapped("sv-b")
    assert (answer["from"], answer["to"], answer["epoch"]) == ("sv-a", "sv-b", epoch + 1)
    assert 0 < answer["paused_seconds"] < answer["swap_seconds"]
    assert 0 < answer["pausing_seconds"] < answer["swap_seconds"] - answer["paused_seconds"]
    status = server.status()
    assert status["active"]["safety_vector"] == "sv-b"
    assert status["weight_version"] == answer["weight_version"] != version
    assert status["rolls_back_to"] == "sv-a"
    assert status["swaps"][0]["outcome"] == "swapped"
    assert status["engines"][0]["ranks"][0]["staged_bytes"] == 0
    assert server.weights() != weights
    assert server.swap("sv-b")[1]["outcome"] == "unchanged"
    answered, back = server.rollback()
    assert (answered, back["outcome"], back["to"]) == (200, "rolled_back", "sv-a")
    assert (server.weights(), server.tokens()) == (weights, tokens)
    assert server.status()["weight_version"] == version


def test_another_beta_is_another_version(server):
    first = server.status()["weight_version"]
    answer = server.swapped("sv-a", beta=1.5)
    assert answer["active"]["beta"] == 1.5
    assert answer["weight_version"] != first
    server.swapped("sv-a")
    assert server.status()["weight_version"] == first


def test_no_vector_is_served_only_when_asked_by_that_name(server):
    server.swapped("@none")
    status = server.status()
    assert status["active"]["safety_vector"] == status["weight_version"] == "@none"
    assert status["active"]["vector_digest"] is None
    assert status["ready"]
    assert server.swapped("sv-b")["from"] == "@none"


def test_a_dry_run_changes_nothing(server):
    before = server.status()
    answered, document = server.swap("sv-b", dry_run=True)
    assert (answered, document["outcome"]) == (200, "dry_run")
    assert document["active"]["safety_vector"] == "sv-b"
    assert document["paused_seconds"] == 0
    assert server.status()["epoch"] == before["epoch"]
    assert server.status()["active"] == before["active"]


def test_vectors(server):
    _, document = server.get("/v1/enchtable/vectors")
    vectors = {entry["name"]: entry for entry in document["vectors"]}
    assert vectors["sv-a"]["active"]
    assert vectors["sv-b"]["planned"]
    assert not vectors["sv-unplanned"]["planned"]
    assert vectors["sv-b"]["digest"].startswith("blake3:")


def test_of_two_at_once_one_wins_whichever_server_they_ask(server, fault):
    """Two API servers have no lock between them: it is on the ranks."""
    asked = set()
    for name in ["sv-b", "sv-a"] * 10:  # until chance has sent some of the six to either
        before = len(server.swapped_by())
        server.swapped_once(fault, name, clients=6)
        assert server.status()["active"]["safety_vector"] == name
        answered = server.swapped_by()[before:]
        assert len(answered) == 6
        asked = set(answered)
        if len(asked) == 2:
            break
    assert asked == {"ApiServer_0", "ApiServer_1"}


def test_serving_goes_on_while_a_vector_is_staged(server, fault):
    tokens = server.tokens()
    with server.held(fault, "sv-b") as swap:
        assert server.tokens() == tokens
        assert not swap.done()
    answered, answer = swap.result()
    assert (answered, answer["outcome"]) == (200, "swapped")
    assert server.tokens() != tokens


def test_staging_that_takes_too_long_is_given_up(server, fault):
    fault.write_text(json.dumps({"command": "stage", "do": "sleep", "seconds": SLOWLY}))
    answered, document = server.swap("sv-b", timeout_seconds=0.5)
    assert (answered, document["error"]["code"]) == (504, "timeout")
    assert server.status()["active"]["safety_vector"] == "sv-a"
    fault.unlink()
    server.swapped("sv-b")  # the lock is free, and what was staged late is not taken for this
    time.sleep(SLOWLY)
    assert server.status()["active"]["safety_vector"] == "sv-b"


def test_a_client_that_goes_away_does_not_stop_a_swap(server, fault):
    fault.write_text(json.dumps({"command": "poll", "do": "hold"}))
    body = {"safety_vector": "sv-b"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/enchtable/swap", json=body, headers=KEY | live.ADMIN, timeout=0.5
        )
    assert server.status()["state"] == "swapping"
    fault.unlink()
    deadline = time.monotonic() + 60
    while server.status()["state"] != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.status()["active"]["safety_vector"] == "sv-b"
    assert server.status()["swaps"][0]["outcome"] == "swapped"


@pytest.mark.parametrize("pause", ["keep", "wait"])
def test_running_requests_end_as_they_would(server, fault, pause):
    with ThreadPoolExecutor(3) as pool:
        with server.held(fault, "sv-b", pause=pause) as swap:
            running = server.begin(pool, 3)
        assert swap.result()[0] == 200
        reasons = [r.result().json()["choices"][0]["finish_reason"] for r in running]
    assert reasons == ["length"] * 3


def test_aborted_requests_say_so(server, fault):
    """Asked for again and again: at the moment of the pause some run, however fast the machine."""

    def reasons(swap):
        found = set()
        while not swap.done():
            answer = server.complete(max_tokens=OUTLASTING, ignore_eos=True)
            found.add(answer.json()["choices"][0]["finish_reason"])
        return found

    with ThreadPoolExecutor(4) as pool:
        with server.held(fault, "sv-b", pause="abort") as swap:
            asking = [pool.submit(reasons, swap) for _ in range(3)]
            server.begin(pool, 1)
        assert swap.result()[0] == 200
        found = set().union(*(one.result() for one in asking))
    assert "abort" in found
    assert found <= {"abort", "length"}


def spoken(server, prompt, max_tokens):
    """Each token of a greedy answer, with its logprob, as they come; nothing cached is used."""
    body = {
        "model": str(server.command[2]), "prompt": prompt, "max_tokens": max_tokens,
        "temperature": 0, "ignore_eos": True, "stream": True, "detokenize": False,
        "logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True,
        "cache_salt": secrets.token_hex(8),
    }  # fmt: skip
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                logprobs = choice["logprobs"]["token_logprobs"]
                yield from zip(choice["token_ids"], logprobs, strict=True)


def test_every_token_of_a_kept_request_is_of_the_old_weights_or_of_the_new(server, fault):
    """To the last bit of its logprob: some that the old weights say, then what the new ones say.

    Asked one at a time: requests that are computed together round differently. On a machine that
    is busy with other things the swap may come after the last token; then more are asked for.
    """
    prompt = [1, 5, 9, 200, 17]
    for tokens in (OUTLASTING // 4, OUTLASTING // 2, OUTLASTING, OUTLASTING, OUTLASTING):
        old = list(spoken(server, prompt, tokens))
        with server.held(fault, "sv-b") as swap:
            answer = spoken(server, prompt, tokens)
            kept = [next(answer)]
        assert swap.result()[1]["outcome"] == "swapped"
        kept += answer
        if kept != old:
            break
        server.swapped("sv-a")
    first = [mine == theirs for mine, theirs in zip(kept, old, strict=True)].index(False)
    assert first > 0
    assert [token for token, _ in kept] != [token for token, _ in old]
    said = [token for token, _ in kept[:first]]
    assert kept[first:] == list(spoken(server, prompt + said, tokens - first))


def test_an_answer_tells_the_version_it_ended_with(server, fault):
    name = "X-Enchtable-Version"
    version = server.status()["weight_version"]
    assert server.complete().headers[name] == version
    for _ in range(5):  # where all else is slow, the swap can come too late
        with ThreadPoolExecutor(1) as pool:
            with server.held(fault, "sv-b") as swap:
                (running,) = server.begin(pool, 1, max_tokens=OUTLASTING)
            after = swap.result()[1]["weight_version"]
            told = running.result().headers[name]
        if told == after:
            break
        assert told == version
        server.swapped("sv-a")
    assert told == after
    assert server.complete().headers[name] == after != version


def test_a_stream_tells_it_after_its_last_event(server):
    body = {
        "model": str(server.command[2]), "prompt": [1, 2, 3], "max_tokens": 4, "stream": True,
        "detokenize": False,
    }  # fmt: skip
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert "X-Enchtable-Version" not in response.headers
    *_, done, comment = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]"
    assert comment == f": enchtable-version {server.status()['weight_version']}"


def test_a_cached_prefix_is_not_used_with_other_weights(server):
    """The KV cache is cleared: the same prompt gives what it gives with no cache."""

    def hits():
        text = server.http.get("/metrics").text
        return sum(map(float, re.findall(r"^vllm:prefix_cache_hits_total\S* (\S+)", text, re.M)))

    prompt = list(range(3, 403))  # more than a block, which on the CPU holds 128 tokens
    first = server.tokens(prompt=prompt)
    before = hits()
    assert server.tokens(prompt=prompt) == first
    assert hits() > before, "nothing is cached here, and nothing proved"
    server.swapped("sv-ffn", beta=8.0)
    other = server.tokens(prompt=prompt)
    assert other == server.tokens(prompt=prompt, cache_salt="another") != first
    server.swapped("sv-a")
    assert server.tokens(prompt=prompt) == first
