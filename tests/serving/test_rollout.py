"""Roll-outs over three real servers: done, refused, failed, cut off, killed, and every way back.

The first two share a vector root; the third has one of its own, so that it can disagree.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import httpx
import live
import models
import pytest

from enchtable_vllm.plan.vector_root import VectorRoot

pytestmark = pytest.mark.slow

MAIN = [sys.executable, "-c", "from enchtable_vllm.cli import main; main()"]
QUICK = ["--pause", "0", "--patience", "3s"]
DOES_NOT_ANSWER = {"state": "lost", "serves": None}


@dataclass
class Fleet:
    """Three servers.

    Attributes:
        roots: Of each; the first two are the same.
        servers: Running, mostly.
    """

    roots: list
    servers: list
    folder: object

    def start(self, number, port=None):
        """Begin to start one; with a port, as a restart does."""
        with pytest.MonkeyPatch.context() as patch:
            if port is not None:
                patch.setattr(live, "free_port", lambda: port)
            return live.Live(
                self.roots[number],
                self.folder / f"log-{number}",
                "--no-skip-tokenizer-init",
                "--enforce-eager",
                start={"safety_vector": "@current"},
            )

    def kill(self, number):
        """As the kernel does when memory is short."""
        with suppress(ProcessLookupError):
            os.killpg(self.servers[number].process_group, signal.SIGKILL)
        self.stop(number)

    def stop(self, number):
        self.servers[number].http.close()
        self.servers[number].stop()

    def restart(self, number):
        port = httpx.URL(self.servers[number].url).port
        self.servers[number] = self.start(number, port).__enter__()

    def serves(self):
        """Name and epoch of each."""
        found = [server.status() for server in self.servers]
        return [(said["active"]["safety_vector"], said["epoch"]) for said in found]

    def names(self):
        return [name for name, _ in self.serves()]

    def desired(self):
        """What restarts would serve."""
        return [VectorRoot(root.path).current().safety_vector for root in self.roots]

    def begin(self, *options, vector="sv-b", urls=None):
        """Start a roll-out; its events are lines of its output."""
        urls = urls or [server.url for server in self.servers]
        targets = [word for url in urls for word in ("--url", url)]
        return subprocess.Popen(
            [*MAIN, "rollout", "--safety-vector", vector, *targets, *QUICK, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "ENCHTABLE_ADMIN_TOKEN": live.TOKEN},
        )  # fmt: skip

    def roll_out(self, *options, **more):
        return ended(self.begin(*options, **more))


def ended(process):
    """Exit code and events of a roll-out."""
    out, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    assert live.TOKEN not in out + errors
    return process.returncode, [json.loads(line) for line in out.splitlines()]


def wait_for(process, kind, **facts):
    """Read a roll-out's events up to one of them."""
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == kind and facts.items() <= event.items():
            return event
    raise AssertionError(f"no '{kind}': {process.stderr.read()}")


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def states(events):
    return [target["state"] for target in events[-1]["targets"]]


@pytest.fixture(scope="module")
def three(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    family = models.copy_family(family, folder / "family")
    models.add_tokenizer(family.task)
    shared = live.make_root(family, folder / "shared")
    own = replace(shared, path=folder / "own")
    shutil.copytree(shared.path, own.path)
    for root in (shared, own):
        VectorRoot(root.path).set_current("sv-a", None)
    fleet = Fleet([shared, shared, own], [], folder)
    fleet.servers = [fleet.start(number) for number in range(3)]
    with ExitStack() as stack:
        for number in range(3):
            stack.callback(fleet.stop, number)
        for server in fleet.servers:
            server.__enter__()
        yield fleet


@pytest.fixture
def fleet(three):
    """All serve ``sv-a``, and would after a restart."""
    for server in three.servers:
        status, answer = server.swap("sv-a", persist=True)
        assert status == 200, answer
    assert three.names() == three.desired() == ["sv-a"] * 3
    return three


def test_all_are_changed_checked_and_left_alone_the_second_time(fleet):
    before = fleet.serves()
    code, events = fleet.roll_out("--max-unavailable", "2")
    assert (code, states(events)) == (0, ["swapped"] * 3), events
    assert fleet.serves() == [("sv-b", epoch + 1) for _, epoch in before]
    assert fleet.desired() == ["sv-b"] * 3
    first, *rest = [server.url for server in fleet.servers]
    assert [step["urls"] for step in of_kind(events, "step")] == [[first], rest]
    assert [check["ok"] for check in of_kind(events, "checked")] == [True, True]
    assert {event["seen_by"] for event in of_kind(events, "swapped")} == {"answer"}

    code, events = fleet.roll_out()
    assert (code, states(events)) == (0, ["already"] * 3)
    assert fleet.serves() == [("sv-b", epoch + 1) for _, epoch in before]


def test_another_beta_is_another_merge(fleet):
    code, events = fleet.roll_out("--beta", "0.25")
    assert code == 0, events
    code, events = fleet.roll_out("--beta", "0.125", "--check", "false")
    assert (code, states(events)[0]) == (3, "restored"), events
    assert {server.status()["active"]["beta"] for server in fleet.servers} == {0.25}
    assert fleet.servers[0].status()["desired"]["beta"] == 0.25


@contextmanager
def flipped(root, name):
    """A bit of a vector's last byte."""
    path = root.path / name / "safety_vector.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    yield
    path.write_bytes(whole)


def test_one_that_would_refuse_is_found_before_anything_is_changed(fleet):
    before = fleet.serves()
    with flipped(fleet.roots[2], "sv-b"):
        code, events = fleet.roll_out()
    assert (code, states(events)) == (1, ["untouched"] * 3)
    (refused,) = of_kind(events, "refused")
    assert refused["url"] == fleet.servers[2].url
    assert "Its bytes changed" in refused["reason"]
    assert fleet.serves() == before


def test_one_that_refuses_in_the_middle_takes_all_back(fleet):
    with flipped(fleet.roots[2], "sv-b"):
        code, events = fleet.roll_out("--no-dry-run")
    assert (code, states(events)) == (3, ["restored"] * 3), events
    assert of_kind(events, "failed")[0]["code"] == "refused"
    back = [event["url"] for event in of_kind(events, "rolled_back")]
    assert back == [server.url for server in fleet.servers][::-1]
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3


def test_a_failing_program_takes_the_canary_back(fleet):
    program = "sh -c 'case $ENCHTABLE_WEIGHT_VERSION in sv-b:*) exit 9;; esac'"
    code, events = fleet.roll_out("--check", program)
    assert (code, states(events)) == (3, ["restored", "untouched", "untouched"]), events
    assert "exited with 9" in of_kind(events, "checked")[0]["faults"][0]
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3


def test_an_unknown_vector_is_refused_by_each(fleet):
    code, events = fleet.roll_out(vector="sv-nowhere")
    assert (code, len(of_kind(events, "refused"))) == (1, 3)


def test_somebody_elses_swap_in_between_is_noticed_and_left(fleet):
    process = fleet.begin("--pause", "2s")
    wait_for(process, "waiting")
    fleet.servers[1].swapped("sv-q")
    code, events = ended(process)
    assert (code, states(events)) == (4, ["restored", "lost", "untouched"])
    assert of_kind(events, "failed")[0]["code"] == "wrong_epoch"
    assert "Somebody else" in of_kind(events, "not_rolled_back")[0]["reason"]
    assert fleet.names() == ["sv-a", "sv-q", "sv-a"]


def test_a_signal_rolls_back(fleet):
    process = fleet.begin("--pause", "60s")
    wait_for(process, "waiting")
    process.send_signal(signal.SIGTERM)
    code, events = ended(process)
    assert (code, states(events)) == (143, ["restored", "untouched", "untouched"])
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3


def test_servers_that_restart_with_what_is_then_given_up_are_brought_back(fleet):
    """The canary, without a history then; and one that was not asked yet, and shares its root."""
    process = fleet.begin("--pause", "600s")
    wait_for(process, "waiting")
    for number in (0, 1):
        fleet.kill(number)
        fleet.restart(number)
    assert fleet.names() == ["sv-b", "sv-b", "sv-a"]
    process.send_signal(signal.SIGTERM)
    code, events = ended(process)
    assert (code, states(events)) == (143, ["restored", "restored", "untouched"]), events
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3
    # Where β was left to each plan, it still is.
    assert [VectorRoot(root.path).current().beta for root in fleet.roots] == [None] * 3


def test_what_a_signal_left_is_continued_or_aborted(fleet):
    for again, codes, names in (([], 0, "sv-b"), (["--abort"], 3, "sv-a")):
        if fleet.names() != ["sv-a"] * 3:
            fleet.roll_out(vector="sv-a")
        process = fleet.begin("--pause", "60s", "--keep-on-interrupt")
        wait_for(process, "waiting")
        process.send_signal(signal.SIGINT)
        code, events = ended(process)
        assert (code, states(events)) == (130, ["swapped", "untouched", "untouched"])
        epoch = fleet.serves()[0][1]
        code, events = fleet.roll_out(*again)
        assert (code, fleet.names()) == (codes, [names] * 3), events
        assert of_kind(events, "resumed")[0]["changed"] == [fleet.servers[0].url]
        assert fleet.serves()[0][1] == epoch + (1 if again else 0)  # not swapped twice


def test_a_killed_roll_out_continues(fleet):
    before = fleet.serves()
    process = fleet.begin()
    wait_for(process, "swapping", url=fleet.servers[1].url)
    process.kill()
    process.communicate()
    code, events = fleet.roll_out()
    assert (code, states(events)) == (0, ["swapped"] * 3), events
    assert fleet.serves() == [("sv-b", epoch + 1) for _, epoch in before]


class Cutter:
    """A proxy that loses the request, or the answer, of swaps."""

    def __init__(self, url, lose):
        self._to = httpx.URL(url)
        self._lose = lose
        self.left = 1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._to.host, self._to.port))
                cut = threading.Event()
                for one in ((near, far, cut, True), (far, near, cut, False)):
                    threading.Thread(target=self._pass_on, args=one, daemon=True).start()

    def _pass_on(self, source, sink, cut, asking):
        with suppress(OSError), source, sink:
            while chunk := source.recv(65536):
                if asking and b"POST /v1/enchtable/swap" in chunk and self.left:
                    self.left -= 1
                    cut.set()
                if cut.is_set() and asking == (self._lose == "request"):
                    for end in (source, sink):
                        end.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(chunk)


@pytest.mark.parametrize(("lose", "seen_by"), [("answer", "status"), ("request", "answer")])
def test_a_connection_lost_in_a_swap(fleet, lose, seen_by):
    """Whether it happened is looked up: swapped once, either way."""
    before = fleet.serves()
    cutter = Cutter(fleet.servers[1].url, lose)
    urls = [fleet.servers[0].url, cutter.url, fleet.servers[2].url]
    code, events = fleet.roll_out("--no-dry-run", urls=urls)
    cutter.close()
    assert (code, cutter.left) == (0, 0), events
    assert [event["seen_by"] for event in of_kind(events, "swapped")] == [
        "answer", seen_by, "answer"
    ]  # fmt: skip
    assert fleet.serves() == [("sv-b", epoch + 1) for _, epoch in before]


def test_one_server_by_command(fleet):
    url = ("--url", fleet.servers[0].url)
    token = {**os.environ, "ENCHTABLE_ADMIN_TOKEN": live.TOKEN}

    def run(*words):
        done = subprocess.run(
            [*MAIN, *words, "--json"], capture_output=True, text=True, check=False, env=token
        )
        return done.returncode, done.stdout, done.stderr

    vector = ("--safety-vector", "sv-b")
    assert json.loads(run("swap", *url, *vector, "--dry-run")[1])["outcome"] == "dry_run"
    assert json.loads(run("status", *url)[1])["active"]["safety_vector"] == "sv-a"
    assert json.loads(run("swap", *url, *vector)[1])["outcome"] == "swapped"
    assert json.loads(run("swap", *url, *vector)[1])["outcome"] == "unchanged"
    assert json.loads(run("rollback", *url)[1])["to"] == "sv-a"
    assert json.loads(run("swap", *url, "--safety-vector", "@none")[1])["to"] == "@none"
    code, _, error = run("swap", *url, "--safety-vector", "sv-flipped")
    assert (code, "Its bytes changed" in error) == (1, True)
    code, _, error = run("swap", *url, *vector, "--expected-epoch", "0")
    assert (code, "wrong_epoch" in error) == (1, True)


def test_a_server_killed_in_the_middle(fleet):
    """The canary dies after its swap, alone knowing what the root said before."""
    process = fleet.begin("--pause", "60s")
    wait_for(process, "waiting")
    fleet.kill(0)
    process.send_signal(signal.SIGTERM)
    code, events = ended(process)
    assert (code, states(events)) == (4, ["lost", "untouched", "untouched"])
    assert events[-1]["targets"][0].items() >= DOES_NOT_ANSWER.items()
    assert fleet.desired() == ["sv-a"] * 3  # by a server of that root that never was changed
    fleet.restart(0)
    assert fleet.names() == ["sv-a"] * 3
    code, events = fleet.roll_out()
    assert (code, states(events)) == (3, ["restored", "untouched", "untouched"]), events
    assert of_kind(events, "resumed")[0]["going"] == "back"
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3


def test_a_server_that_dies_in_the_middle_is_noticed(fleet):
    """Nobody tells the roll-out: its check finds it, the others go back, and it is listed."""
    process = fleet.begin("--pause", "2s")
    wait_for(process, "swapped", url=fleet.servers[1].url)
    fleet.kill(1)
    code, events = ended(process)
    assert (code, states(events)) == (4, ["restored", "lost", "untouched"]), events
    assert not of_kind(events, "interrupted")
    (failed,) = [event for event in of_kind(events, "checked") if not event["ok"]]
    assert fleet.servers[1].url in str(failed["faults"])
    assert [event["url"] for event in of_kind(events, "rolled_back")] == [fleet.servers[0].url]
    assert events[-1]["targets"][1].items() >= DOES_NOT_ANSWER.items()
    assert fleet.desired() == ["sv-a"] * 3
    fleet.restart(1)
    assert fleet.names() == ["sv-a"] * 3
    code, events = fleet.roll_out()  # of the journal only it is left, and it is back already
    assert (code, states(events)) == (3, ["restored", "restored", "untouched"]), events
    assert fleet.names() == fleet.desired() == ["sv-a"] * 3
