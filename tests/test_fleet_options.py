"""What each option of ``enchtable rollout`` reaches, and what becomes of a server that dies."""

import json
import socket
from contextlib import ExitStack

import pytest
from answering import Answering
from typer.testing import CliRunner

from enchtable_vllm import cli

TOKEN = "admin-token-of-this-test"
#: No program of this machine's asks the servers anything.
UNCHECKED = ("--check", "true")


class Checked(Answering):
    """Answers what the built-in check asks, too.

    Args:
        dies: When it is first asked whether it is ready for another vector than its first.
    """

    def __init__(self, *, dies=False):
        super().__init__()
        self.dies, self.dead = dies, False

    def answer(self, method, path, body, headers):
        asked = (method, path)
        self.dead |= self.dies and asked == ("GET", "/enchtable/ready")
        if self.dead:
            raise ConnectionResetError
        if asked in (("GET", "/enchtable/ready"), ("GET", "/metrics")):
            return 200, {}
        return super().answer(method, path, body, headers)

    def said(self, path="/v1/enchtable/swap"):
        """What it was told to do; dry runs apart."""
        return [body for to, body in self.bodies if to == path and not body.get("dry_run")]


@pytest.fixture(autouse=True)
def _own_token(monkeypatch):
    for name in ("ENCHTABLE_ADMIN_TOKEN_FILE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", TOKEN)


def events_of(*words):
    """Exit code and events of a roll-out to ``sv-b``."""
    command = ["rollout", "--safety-vector", "sv-b", "--pause", "0", *words]
    done = CliRunner().invoke(cli.app, command)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events, (done.output, done.exception)
    assert TOKEN not in done.output
    return done.exit_code, events


def roll_out(servers, *words):
    """The same, over these servers; their URLs last."""
    with ExitStack() as stack:
        urls = [stack.enter_context(server.serve()) for server in servers]
        targets = [word for url in urls for word in ("--url", url)]
        return *events_of(*targets, *words), urls


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def test_canary_is_how_many_come_before_all_others():
    servers = [Checked() for _ in range(4)]
    code, events, urls = roll_out(servers, *UNCHECKED, "--canary", "2", "--max-unavailable", "4")
    assert code == 0
    assert [step["urls"] for step in of_kind(events, "step")] == [urls[:2], urls[2:]]
    assert [server.vector for server in servers] == ["sv-b"] * 4


def test_prompts_are_what_the_built_in_check_asks(tmp_path):
    (tmp_path / "prompts").write_text("Capital of France?\n\nAnd of Chad?\n")
    server = Checked()
    code, events, _ = roll_out([server], "--prompts", str(tmp_path / "prompts"))
    assert (code, of_kind(events, "checked")[0]["faults"]) == (0, [])
    assert server.asked == ["Capital of France?", "And of Chad?"]


def test_state_is_where_the_journal_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "elsewhere" / "journal.json"
    code, events, urls = roll_out([Checked()], *UNCHECKED, "--state", str(path))
    assert (code, of_kind(events, "began")[0]["state_file"]) == (0, str(path))
    assert json.loads(path.read_text())["request"]["targets"] == urls
    assert not (tmp_path / "cache").exists()
    code, events, _ = roll_out([Checked()], *UNCHECKED)
    (default,) = (tmp_path / "cache" / "rollouts").glob("*.json")
    assert (code, of_kind(events, "began")[0]["state_file"]) == (0, str(default))


@pytest.mark.parametrize("pause", ["keep", "wait", "abort"])
def test_requests_is_what_a_server_does_with_those_that_run(pause):
    server = Checked()
    code, _, _ = roll_out([server], *UNCHECKED, "--requests", pause)
    assert (code, [body["pause"] for body in server.said()]) == (0, [pause])
    first, second = Checked(), Checked()
    code, _, _ = roll_out([first, second], "--check", "false", "--requests", pause)
    assert (code, [body["pause"] for body in first.said("/v1/enchtable/rollback")]) == (3, [pause])
    assert second.said() == []


def test_timeout_is_for_staging_dry_or_not():
    server = Checked()
    assert roll_out([server], *UNCHECKED, "--timeout", "1m30s")[0] == 0
    swaps = [body for path, body in server.bodies if path == "/v1/enchtable/swap"]
    assert [(body["dry_run"], body["timeout_seconds"]) for body in swaps] == [
        (True, 90.0),
        (False, 90.0),
    ]


def test_check_timeout_is_for_the_program():
    server = Checked()
    words = ("--check", "sleep 60", "--check-timeout", "300ms")
    code, events, _ = roll_out([server], *words)
    (fault,) = of_kind(events, "checked")[0]["faults"]
    assert (code, server.vector) == (3, "sv-a")
    assert "'sleep' did not end" in fault


def test_every_swap_of_a_roll_out_is_persisted_and_one_server_is_asked_to():
    server = Checked()
    assert roll_out([server], *UNCHECKED)[0] == 0
    assert [body["persist"] for body in server.said()] == [True]
    with server.serve() as url:
        for words, persisted in (((), False), (("--persist",), True)):
            command = ["swap", "--url", url, "--safety-vector", "sv-a", *words]
            assert CliRunner().invoke(cli.app, command).exit_code == 0
            assert server.said()[-1]["persist"] is persisted


def test_a_name_stands_for_every_address_behind_it(monkeypatch):
    """In the order of numbers, whatever the order of the answer."""
    first, second = Checked(), Checked()
    ask = socket.getaddrinfo

    def answers(host, *arguments, **options):
        if host != "vllm.models":
            return ask(host, *arguments, **options)
        return [
            one
            for address in ("127.0.0.2", "127.0.0.1")
            for one in ask(address, *arguments, **options)
        ]

    with first.serve() as url:
        port = int(url.rpartition(":")[2])
        with second.serve(("127.0.0.2", port)):
            monkeypatch.setattr(socket, "getaddrinfo", answers)
            code, events = events_of("--targets", f"dns://vllm.models:{port}", *UNCHECKED)
    urls = [f"http://127.0.0.{number}:{port}" for number in (1, 2)]
    assert (code, of_kind(events, "began")[0]["targets"]) == (0, urls)
    assert [event["url"] for event in of_kind(events, "swapped")] == urls
    assert (first.vector, second.vector) == ("sv-b", "sv-b")


def test_a_server_that_dies_is_noticed_and_the_others_go_back():
    """After its swap and before its check; the one that comes after it is not touched."""
    servers = [Checked(), Checked(dies=True), Checked()]
    code, events, urls = roll_out(servers, "--patience", "500ms")
    assert code == 4
    assert [target["state"] for target in events[-1]["targets"]] == [
        "restored", "lost", "untouched"
    ]  # fmt: skip
    (failed,) = [event for event in of_kind(events, "checked") if not event["ok"]]
    assert urls[1] in str(failed["faults"])
    assert [event["url"] for event in of_kind(events, "rolled_back")] == urls[:1]
    assert [event["url"] for event in of_kind(events, "not_rolled_back")] == urls[1:2]
    assert (servers[0].vector, servers[2].vector, servers[2].said()) == ("sv-a", "sv-a", [])
