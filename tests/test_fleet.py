"""The parts of a roll-out that need no server: targets, steps, journal, codes, tokens, commands."""

import ast
import asyncio
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from replies import OTHER, SERVED, status

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet import Credentials, Secret, Target, rollout
from enchtable_vllm.fleet.credentials import is_loopback
from enchtable_vllm.fleet.documents import Goal, Served, Status
from enchtable_vllm.fleet.events import EVENT_KINDS, Event, Outcome, exit_code
from enchtable_vllm.fleet.journal import Journal, Record, Request
from enchtable_vllm.fleet.schedule import parse_duration, plan_steps
from enchtable_vllm.fleet.targets import read_targets, resolve_targets

ROOT = Path(__file__).parent.parent
TOKEN = "admin-token-of-this-test"
BEFORE = Served.of(Status.model_validate(status()))


# Targets.


def test_targets_come_from_urls_and_files_each_once(tmp_path):
    file = tmp_path / "urls.txt"
    file.write_text("# ours\nhttp://b:8000/  # the second\n\nhttps://c/gateway/v1\nhttp://A:8000\n")
    assert read_targets(["http://a:8000/v1", str(file), "dns://svc.ns:8000"]) == [
        "http://a:8000",
        "http://b:8000",
        "https://c/gateway",
        "dns://svc.ns:8000",
    ]


@pytest.mark.parametrize(
    "name",
    ["ftp://h:1", "http://", "http://h:port", "http://h/?a=1", "http://h/#a", "http://h o",
     "dns://svc", "dns://svc:1/path", "http://[::1"],
)  # fmt: skip
def test_what_is_no_target_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="target '"):
        read_targets([name])


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        read_targets(["http://me:hunter2@host:8000"])
    assert "hunter2" not in str(caught.value)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    for name in ("empty", "missing"):
        with pytest.raises(ConfigError, match=f"{name}"):
            read_targets([str(tmp_path / name)])


def resolved(named, addresses):
    async def resolver(host, port):
        assert (host, port) == ("svc.ns", 8000)
        return addresses

    return asyncio.run(resolve_targets(named, resolver))


def test_each_address_behind_a_name_is_a_target():
    """In the order of numbers, so that the same pod is the canary in every run."""
    found = ["10.0.0.10", "fd00::1", "10.0.0.9", "10.0.0.9"]
    assert resolved(["dns://svc.ns:8000", "http://10.0.0.9:8000"], found) == [
        Target("http://10.0.0.9:8000"),
        Target("http://10.0.0.10:8000"),
        Target("http://[fd00::1]:8000"),
    ]
    assert resolved(["dns+https://svc.ns:8000"], ["10.0.0.9"]) == [
        Target("https://10.0.0.9:8000", "svc.ns")
    ]


def test_the_systems_resolver_is_asked_by_default():
    (target,) = {
        t for t in asyncio.run(resolve_targets(["dns://localhost:8000"])) if "127." in t.url
    }
    assert target.url == "http://127.0.0.1:8000"


def test_a_name_without_addresses_is_refused():
    with pytest.raises(ConfigError, match="headless"):
        resolved(["dns://svc.ns:8000"], [])

    async def fails(*_):
        raise OSError("no such name")

    with pytest.raises(ConfigError, match="no such name"):
        asyncio.run(resolve_targets(["dns://svc.ns:8000"], fails))


# Steps and durations.


@pytest.mark.parametrize(
    ("canaries", "at_once", "steps"),
    [
        (1, 1, ["a", "b", "c", "d", "e"]),
        (1, 2, ["a", "bc", "de"]),
        (0, 2, ["ab", "cd", "e"]),
        (3, 2, ["ab", "c", "de"]),
        (9, 9, ["abcde"]),
        (2, 9, ["ab", "cde"]),
    ],
)
def test_steps_have_canaries_first_and_never_too_many_at_once(canaries, at_once, steps):
    planned = plan_steps("abcde", canaries=canaries, at_once=at_once)
    assert ["".join(step) for step in planned] == steps


def test_nothing_to_do_has_no_steps():
    assert plan_steps([], canaries=1, at_once=1) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0", 0), ("60s", 60), ("2m", 120), ("1h30m", 5400), ("500ms", 0.5), ("1.5m", 90)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1 h", "1e3", "inf", "nan", "9" * 400])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="a duration"):
        parse_duration(text)


# Tokens.


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch):
    for name in ("ENCHTABLE_ADMIN_TOKEN", "ENCHTABLE_ADMIN_TOKEN_FILE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_tokens_come_from_files_before_the_environment(tmp_path, monkeypatch):
    for name in ("named", "by-variable", "key"):
        (tmp_path / name).write_text(f"from-{name}\n")
    assert Credentials.find() == Credentials(None, None)
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN_FILE", str(tmp_path / "by-variable"))
    assert Credentials.find().admin.reveal() == "from-by-variable"
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN", "from-variable")
    monkeypatch.setenv("VLLM_API_KEY", "key-from-variable")
    found = Credentials.find()
    assert (found.admin.reveal(), found.api_key.reveal()) == ("from-variable", "key-from-variable")
    found = Credentials.find(tmp_path / "named", tmp_path / "key")
    assert (found.admin.reveal(), found.api_key.reveal()) == ("from-named", "from-key")


@pytest.mark.parametrize("text", ["", "two words", "a\nX-Other: b", "tökén", "a\x00"])
def test_what_cannot_be_a_header_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        Secret(text, "the file")
    assert not text or text not in str(caught.value)


def test_a_secret_does_not_print():
    secret = Secret(TOKEN, "x")
    assert TOKEN not in f"{secret!r} {secret} {Credentials(secret)} {vars(Credentials(secret))}"


@pytest.mark.parametrize(
    ("url", "openly"),
    [("http://127.0.0.1:1", False), ("http://localhost", False), ("http://[::1]:1", False),
     ("http://10.0.0.1", True), ("http://localhost.evil.org", True), ("https://10.0.0.1", False)],
)  # fmt: skip
def test_plain_http_to_another_machine_is_known(url, openly):
    assert Target(url).sends_openly is openly
    assert is_loopback("127.9.9.9")


# The journal.

REQUEST = Request(targets=("http://a", "http://b"), safety_vector="sv-b")
RECORD = Record(state="asked", before=BEFORE, goal=Goal(**OTHER))


def test_an_unfinished_journal_is_continued_in_the_order_of_asking(tmp_path):
    path = tmp_path / "state.json"
    with Journal(path, REQUEST) as journal:
        assert not journal.resumed
        for url in ("http://b", "http://a", "http://c"):
            journal.set(url, RECORD)
        journal.set("http://b", RECORD.model_copy(update={"state": "swapped"}))
        journal.set("http://c", RECORD.model_copy(update={"state": "restored"}))
    with Journal(path, REQUEST) as journal:
        assert journal.resumed
        assert journal.changed() == ["http://b", "http://a"]
        assert journal.records["http://a"] == RECORD
        journal.set("http://b", RECORD)
        assert journal.changed() == ["http://a", "http://b"]
        assert journal.going_back is None
        journal.turn_back("a check failed")
        journal.finish(Outcome.MIXED)
    with Journal(path, REQUEST) as journal:
        assert journal.going_back == "a check failed"
        journal.finish(Outcome.ROLLED_BACK)
    with Journal(path, REQUEST) as journal:
        assert (journal.resumed, journal.records, journal.going_back) == (False, {}, None)


def test_a_finished_journal_is_begun_anew_and_a_kept_one_is_not(tmp_path):
    for outcome, resumed in ((Outcome.DONE, False), (Outcome.KEPT, True)):
        with Journal(tmp_path / outcome, REQUEST) as journal:
            journal.set("http://a", RECORD)
            journal.finish(outcome)
        with Journal(tmp_path / outcome, REQUEST) as journal:
            assert journal.resumed is resumed


def test_one_process_at_a_time(tmp_path):
    with (
        Journal(tmp_path / "s", REQUEST),
        pytest.raises(ConfigError, match="no other process"),
        Journal(tmp_path / "s", REQUEST),
    ):
        pass


def test_a_foreign_or_damaged_journal_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "s"
    with Journal(path, REQUEST.model_copy(update={"beta": 0.4})) as journal:
        journal.set("http://a", RECORD)
    for stored in (path.read_bytes(), b"{}", b"torn"):
        path.write_bytes(stored)
        with pytest.raises(ConfigError, match="--state"), Journal(path, REQUEST):
            pass
        assert path.read_bytes() == stored


def test_a_journal_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="written to"), Journal(tmp_path / "file" / "s", REQUEST):
        pass


def test_the_same_request_has_the_same_journal(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path))
    same = Request(targets=("http://b", "http://a"), safety_vector="sv-b")
    assert REQUEST.state_file() == same.state_file()
    with Journal(tmp_path / "s", REQUEST) as journal:
        journal.set("http://a", RECORD)
    with Journal(tmp_path / "s", same) as journal:
        assert journal.changed() == ["http://a"]
    assert REQUEST.state_file().parent == tmp_path / "rollouts"
    others = [{"beta": 0.4}, {"safety_vector": "sv-c"}, {"targets": ("http://a",)}]
    files = {REQUEST.model_copy(update=other).state_file() for other in others}
    assert len(files | {REQUEST.state_file()}) == 4


# What ends, and how.


@pytest.mark.parametrize(
    ("outcome", "number", "code"),
    [
        (Outcome.DONE, None, 0),
        (Outcome.REFUSED, None, 1),
        (Outcome.ROLLED_BACK, None, 3),
        (Outcome.MIXED, None, 4),
        (Outcome.ROLLED_BACK, 2, 130),
        (Outcome.KEPT, 15, 143),
        (Outcome.MIXED, 15, 4),
        (Outcome.DONE, 15, 0),
    ],
)
def test_exit_codes(outcome, number, code):
    assert exit_code(outcome, number) == code


def test_events_are_documented():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "fleet.md").read_text(), re.M)
    documented = {kind: set(re.findall(r"`(\w+)`", keys)) for kind, keys in rows}
    assert documented.keys() == set(EVENT_KINDS)
    told = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(rollout)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._tell"
    ]
    assert len(told) >= len(EVENT_KINDS)
    for call in told:
        assert {k.arg for k in call.keywords} <= documented[call.args[0].value], ast.unparse(call)
    line = Event("waiting", {"seconds": 3}).to_json()
    assert list(line) == ["event", "time", "seconds"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


@pytest.mark.parametrize(
    ("goal", "served", "met"),
    [
        (Goal(**OTHER), OTHER, True),
        (Goal(**OTHER), OTHER | {"safety_vector": "another-name"}, True),
        (Goal(**OTHER), OTHER | {"beta": 0.4}, False),
        (Goal(**OTHER), OTHER | {"plan_digest": "blake3:x"}, False),
        (Goal(**OTHER), SERVED, False),
        (Goal(safety_vector="sv-b", vector_digest="blake3:bb"), OTHER, True),
        (Goal(safety_vector="sv-b"), SERVED, False),
        (Goal(safety_vector="@none"), SERVED, False),
        (Goal(**OTHER), dict.fromkeys(OTHER) | {"safety_vector": "@none"}, False),
        (Goal(safety_vector="@none"), dict.fromkeys(OTHER) | {"safety_vector": "@none"}, True),
    ],
)
def test_whether_something_is_served_is_a_matter_of_bytes(goal, served, met):
    assert goal.met_by(Served(**served, weight_version="v", epoch=1)) is met


def test_neither_torch_nor_vllm_is_imported():
    code = (
        "import sys, pkgutil, importlib, enchtable_vllm.fleet as fleet\n"
        "for module in pkgutil.iter_modules(fleet.__path__):\n"
        "    importlib.import_module(f'enchtable_vllm.fleet.{module.name}')\n"
        "import enchtable_vllm.cli.rollout, enchtable_vllm.cli.status\n"
        "print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
