"""The commands that talk to servers, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from replies import OTHER, SERVED, able, fault, status, swapped
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.cli.fleet_options import Access
from enchtable_vllm.cli.rollout_view import shown
from enchtable_vllm.fleet import Target
from enchtable_vllm.fleet.documents import Served, Status
from enchtable_vllm.fleet.events import EVENT_KINDS, Event

ROOT = Path(__file__).parent.parent
TOKEN = "admin-token-of-this-test"


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch):
    for name in ("ENCHTABLE_ADMIN_TOKEN", "ENCHTABLE_ADMIN_TOKEN_FILE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def command(*arguments, token=TOKEN):
    """In a process of its own, without a terminal: (exit code, output, errors)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENCHTABLE_ADMIN")}
    environment |= {"ENCHTABLE_ADMIN_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", "from enchtable_vllm.cli import main; main()", *arguments],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_status_is_a_table_or_the_document():
    server = able(swaps=[{"epoch": 3, "from": "x", "to": "[red]sv-a", "outcome": "swapped"}])
    with server.serve() as url:
        code, out, _ = command("status", "--url", url, token=None)
        assert code == 0
        for text in ("serving, ready", "sv-a aa", "beta 0.5", "epoch 3", "[red]sv-a"):
            assert text in out
        code, out, _ = command("status", "--url", url, "--json", token=None)
    assert json.loads(out)["said_by_a_newer_server"] is True


def test_swap_and_rollback_print_the_answer():
    server = able()
    server.on("POST", "/v1/enchtable/swap", swapped(OTHER))
    server.on("POST", "/v1/enchtable/rollback", swapped(SERVED, outcome="rolled_back"))
    server.on("GET", "/v1/enchtable/status", status(), status(OTHER, epoch=4))
    with server.serve() as url:
        code, out, _ = command("swap", "--url", url, "--safety-vector", "sv-b")
        assert code == 0
        assert "swapped from sv-a to sv-b; beta 0.5, epoch 4" in out
        assert "not persisted" in out
        server.on("GET", "/v1/enchtable/status", status(OTHER, epoch=4), status(epoch=5))
        code, out, _ = command("rollback", "--url", url, "--json")
    assert json.loads(out)["outcome"] == "rolled_back"
    assert server.bodies("/v1/enchtable/rollback")[0]["expected_epoch"] == 4


def test_a_refusal_is_one_message_and_exit_code_one():
    server = able()
    server.on("POST", "/v1/enchtable/swap", (403, fault("admin_token_wrong")))
    with server.serve() as url:
        code, _, error = command("swap", "--url", url, "--safety-vector", "sv-b", "--dry-run")
        assert code == 1
        assert "admin_token_wrong" in error
        code, _, error = command("swap", "--url", url, "--safety-vector", "sv-b", token=None)
    assert code == 1
    assert "--admin-token-file" in error


def test_a_roll_out_that_is_refused_changes_nothing_and_says_why():
    server = able()
    server.on("GET", "/v1/enchtable/vectors", {"vectors": []})
    with server.serve() as url:
        code, out, _ = command("rollout", "--url", url, "--safety-vector", "sv-b")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["began", "refused", "ended"]
    assert (code, events[-1]["exit_code"], events[-1]["outcome"]) == (1, 1, "refused")
    assert server.bodies("/v1/enchtable/swap") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollout", "--safety-vector", "v"],
        ["rollout", "--safety-vector", "v", "--url", "host:8000"],
        ["rollout", "--safety-vector", "v", "--url", "http://h", "--pause", "soon"],
        ["rollout", "--safety-vector", "v", "--url", "http://h", "--max-unavailable", "0"],
        ["rollout", "--safety-vector", "v", "--url", "http://h", "--check", "x", "--prompts", "y"],
        ["rollout", "--safety-vector", "v", "--url", "http://h", "--admin-token", "x"],
        ["swap", "--safety-vector", "v", "--url", "http://h", "--beta", "nan"],
        ["swap", "--safety-vector", "v", "--url", "http://h", "--requests", "drop"],
        ["status", "--url", "dns://h:1"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_aborting_what_never_began_is_refused():
    code, _, error = command(
        "rollout", "--safety-vector", "v", "--url", "http://127.0.0.1:9", "--abort"
    )
    assert code == 1
    assert "--abort" in error


def test_a_token_over_plain_http_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", TOKEN)
    here, there = Target("http://127.0.0.1:9"), Target("http://192.0.2.1:9")
    Access().connect([here], admin=True)
    assert capsys.readouterr().err == ""
    Access().connect([here, there], admin=True)
    warning = capsys.readouterr().err
    assert "http://192.0.2.1:9 over plain http" in warning
    assert TOKEN not in warning
    monkeypatch.delenv("ENCHTABLE_ADMIN_TOKEN")
    Access().connect([there], admin=False)  # nothing to be read on the way
    assert capsys.readouterr().err == ""


def test_the_live_table_shows_every_event_and_takes_no_markup_from_servers(capsys):
    serves = Served.of(Status.model_validate(status())).model_dump(mode="json")
    evil = "http://[red]a\x1b[31m"
    facts = {
        "safety_vector": "[bold]sv-b", "state_file": "s", "targets": [evil, "http://b"],
        "changed": [evil], "going": "back", "url": evil, "serves": serves, "to_do": True,
        "reason": "[red]refused", "step": 1, "steps": 2, "urls": [evil], "paused_seconds": 0.1,
        "seen_by": "answer", "code": "refused", "seconds": 0.5, "ok": False, "faults": ["[b]x"],
        "signal": "SIGINT", "then": "rolls back",
    }  # fmt: skip
    standing = {"url": evil, "state": "lost", "serves": None, "reason": "gone"}
    end = {
        "outcome": "mixed",
        "exit_code": 4,
        "targets": [standing, {**standing, "serves": serves}],
    }
    with shown(as_json=False) as listener:
        for kind in EVENT_KINDS:
            listener(Event(kind, end if kind == "ended" else facts))
    out = capsys.readouterr().out
    for text in (
        "rolling out '[bold]sv-b'",
        "step 1 of 2: http://[red]a",
        "the check failed: [b]x",
        "SIGINT: finishing",
        "mixed, exit code 4",
        "lost; serves not known (gone)",
        "serves sv-a aa, beta 0.5, epoch 3",
    ):
        assert text in out
    assert "\x1b[31m" not in out
