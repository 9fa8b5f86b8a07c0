"""Before a roll-out and after each of its steps: what servers say, put together."""

import asyncio
import json
import re
import sys

import pytest
from replies import CUT, OTHER, Replies, able, fault, listed, status, swapped

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet import Client, Credentials, Secret, Target
from enchtable_vllm.fleet.checks import Changed, built_in, program, read_prompts
from enchtable_vllm.fleet.documents import Goal
from enchtable_vllm.fleet.preflight import Wish, verify

TOKEN = "admin-token-of-this-test"


def talk(urls, question):
    async def run():
        clients = [Client(Target(url), Credentials(Secret(TOKEN, "x"))) for url in urls]
        for client in clients:
            await client.__aenter__()
        try:
            return await question(clients)
        finally:
            for client in clients:
                await client.__aexit__(None, None, None)

    return asyncio.run(run())


def verified(*servers, **options):
    wish = Wish("sv-b", **options)

    def nested(rest, urls):
        if not rest:
            return talk(urls, lambda clients: verify(clients, wish))
        with rest[0].serve() as url:
            return nested(rest[1:], [*urls, url])

    found, refusals = nested(servers, [])
    return list(found.values()), [refusal.reason for refusal in refusals]


def test_servers_that_can_are_asked_by_a_dry_run_alone():
    server = able()
    (one,), refusals = verified(server)
    assert refusals == []
    assert (one.goal, one.there_already) == (Goal(**OTHER), False)
    assert [body["dry_run"] for body in server.bodies("/v1/enchtable/swap")] == [True]


def test_what_is_served_already_is_not_to_be_done():
    server = able(active=OTHER)
    assert verified(server)[0][0].there_already
    assert not verified(server, dry_run=False)[0][0].there_already  # its plan is not known
    assert not verified(able(active=OTHER, as_desired=False))[0][0].there_already


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": "swapping"}, "'swapping'"),
        ({"state": "failed", "reason": "torn"}, "torn"),
        ({"disagreeing": 2}, "2 of its ranks"),
        ({"not_swappable": "quantised"}, "quantised"),
        ({"vectors": {"vectors": []}}, "no 'sv-b'"),
        ({"vectors": listed(planned=False)}, "no plan for its task model: enchtable plan"),
        ({"vectors": listed(fault="flipped")}, "flipped"),
        ({"swap": (422, fault("refused", "a bit flipped."))}, "a bit flipped"),
        ({"swap": CUT}, "an answer"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_server_that_cannot_says_why(change, says):
    server = able(**{k: v for k, v in change.items() if k not in ("vectors", "swap")})
    if "vectors" in change:
        server.on("GET", "/v1/enchtable/vectors", change["vectors"])
    if "swap" in change:
        server.on("POST", "/v1/enchtable/swap", change["swap"])
    found, (reason,) = verified(server)
    assert found == []
    assert says in reason


def test_servers_must_be_of_one_kind():
    other = able(task_model={"id": "x", "fingerprint": "blake3:other"})
    _, (reason,) = verified(able(), other)
    assert "--allow-mixed-models" in reason
    assert verified(able(), other, allow_mixed_models=True)[1] == []
    renamed = able()
    renamed.on("POST", "/v1/enchtable/swap", swapped(OTHER | {"vector_digest": "blake3:forged"}))
    _, (reason,) = verified(able(), renamed, allow_mixed_models=True)
    assert "different vectors of that name" in reason


METRICS = (
    "# TYPE enchtable_ranks_disagreeing gauge\nenchtable_ranks_disagreeing {wrong}\n"
    'enchtable_active_vector_info{{name="sv-b",version="{version}"}} 1.0\n'
)


def healthy(**changes):
    replies = Replies()
    answers = {
        "/enchtable/ready": {},
        "/v1/enchtable/status": status(OTHER),
        "/metrics": METRICS.format(wrong="0.0", version="sv-b:1234"),
        "/v1/models": {"data": [{"id": "tiny"}]},
        "/v1/chat/completions": {"choices": [{"message": {"content": "Paris."}}]},
    } | changes
    for path, answer in answers.items():
        replies.on("POST" if path.endswith("completions") else "GET", path, answer)
    return replies


def checked(server, check):
    with server.serve() as url:

        async def run(clients):
            return await check([Changed(clients[0], Goal(**OTHER), "sv-b:1234")])

        return talk([url], run)


COMPLETION = {"choices": [{"text": " Paris."}]}
REASONED = {"choices": [{"message": {"content": None, "reasoning": "France ..."}}]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"/metrics": "vllm:num_requests_running 0\n"},
        {"/v1/chat/completions": REASONED},
        {"/v1/chat/completions": (400, {"error": {}}), "/v1/completions": COMPLETION},
    ],
    ids=["all", "without log stats", "reasoning", "without a chat template"],
)
def test_a_healthy_server_passes_the_built_in_check(changes):
    assert checked(healthy(**changes), built_in(["Capital of France?"])) == []


SILENT = {"choices": [{"message": {"content": "  "}}]}
STALE = (200, {"choices": [{"message": {"content": "P"}}]}, {"X-Enchtable-Version": "sv-a:0"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"/enchtable/ready": (503, {})}, "not ready"),
        ({"/v1/enchtable/status": status(OTHER, disagreeing=1)}, "1 rank(s) disagree"),
        ({"/metrics": METRICS.format(wrong="1.0", version="sv-b:1234")}, "disagreeing is 1"),
        ({"/metrics": METRICS.format(wrong="0.0", version="sv-a:0")}, "not 'sv-b:1234'"),
        ({"/metrics": (404, {})}, "404"),
        ({"/v1/models": {"data": []}}, "documented answer"),
        ({"/v1/chat/completions": SILENT}, "nothing was answered"),
        ({"/v1/chat/completions": STALE}, "came from 'sv-a:0'"),
        ({"/v1/chat/completions": (500, {})}, "500"),
        ({"/v1/chat/completions": CUT}, "an answer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_part_of_the_built_in_check_can_fail(changes, says):
    (found,) = checked(healthy(**changes), built_in(["Capital of France?"]))
    assert says in found


def run_program(command, **options):
    return checked(healthy(), program(command, **{"timeout_seconds": 20, **options}))


def test_a_program_checks_without_a_shell_and_without_the_admin_token(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", TOKEN)
    script = tmp_path / "check.py"
    script.write_text(
        "import json, os, sys\n"
        "ours = {k: v for k, v in os.environ.items() if k.startswith('ENCHTABLE_')}\n"
        f"json.dump([ours, sys.argv[1:]], open({str(tmp_path / 'out')!r}, 'w'))\n"
    )
    assert run_program(f"{sys.executable} {script} 'two words' ; $HOME *") == []
    ours, arguments = json.loads((tmp_path / "out").read_text())
    assert arguments == ["two words", ";", "$HOME", "*"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", ours.pop("ENCHTABLE_URLS"))
    assert ours.pop("ENCHTABLE_SAFETY_VECTOR") == "sv-b"
    assert ours.pop("ENCHTABLE_WEIGHT_VERSION") == "sv-b:1234"
    assert TOKEN not in str(ours)


def test_a_program_fails_by_its_code_or_its_time():
    (found,) = run_program(f"{sys.executable} -c 'print(\"too many refusals\"); exit(3)'")
    assert found.endswith("exited with 3: too many refusals")
    (found,) = run_program("sleep 60", timeout_seconds=0.2)
    assert "did not end" in found


@pytest.mark.parametrize("command", ["", "no-such-program x", "'unbalanced"])
def test_a_program_that_is_not_there_is_refused_beforehand(command):
    with pytest.raises(ConfigError, match="--check"):
        program(command, timeout_seconds=1)


def test_prompts_come_one_a_line(tmp_path):
    (tmp_path / "p").write_text("Capital of France?\n\n 2 + 3? \n")
    assert read_prompts(tmp_path / "p") == ("Capital of France?", "2 + 3?")
    (tmp_path / "p").write_text("\n")
    for name in ("p", "missing"):
        with pytest.raises(ConfigError, match="--prompts"):
            read_prompts(tmp_path / name)
