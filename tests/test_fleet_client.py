"""One server over HTTP: what is sent to whom, and what becomes of each kind of answer."""

import asyncio

import pytest
from replies import CUT, OTHER, SERVED, Replies, certified, fault, status, swapped

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.fleet import Client, Credentials, Secret, ServerRefused, Target, Unreachable
from enchtable_vllm.fleet.documents import Goal, Served, Status
from enchtable_vllm.fleet.exchange import (
    How,
    NotAsAsked,
    bring_back,
    faults,
    persist_again,
    roll_back,
    swap,
)

TOKEN, KEY = "admin-token-of-this-test", "key-of-this-test"
STATUS, SWAP, ROLLBACK = (f"/v1/enchtable/{name}" for name in ("status", "swap", "rollback"))
HOW = How(persist=True, timeout_seconds=5, patience_seconds=0.2)
BEFORE = Served.of(Status.model_validate(status()))
GOAL = Goal(**OTHER)


@pytest.fixture
def replies():
    return Replies()


def ask(url, question, *, credentials=None, **options):
    """Run one question of an open client."""
    given = credentials or Credentials(Secret(TOKEN, "test"), Secret(KEY, "test"))

    async def run():
        async with Client(Target(url), given, **options) as client:
            return await question(client)

    return asyncio.run(run())


def refusal(replies, answer, question=lambda client: client.swap("sv-b")):
    replies.on("POST", SWAP, answer)
    replies.on("GET", STATUS, answer)
    with replies.serve() as url, pytest.raises(ServerRefused) as caught:
        ask(url, question)
    return caught.value


def test_documents_are_read_and_what_is_unknown_is_kept(replies):
    replies.on("GET", STATUS, status())
    with replies.serve() as url:
        said = ask(url, lambda client: client.status())
    assert (said.epoch, said.active.beta, said.engines[0].ranks[0].rank) == (3, 0.5, 0)
    assert said.to_json()["said_by_a_newer_server"] is True


def test_no_route_gets_a_secret_that_it_does_not_need(replies):
    replies.on("GET", STATUS, status())
    replies.on("GET", "/enchtable/ready", {})
    replies.on("GET", "/metrics", "")
    replies.on("POST", SWAP, swapped(OTHER))

    async def all_of_them(client):
        await client.status()
        await client.ready()
        await client.metrics()
        await client.swap("sv-b")

    with replies.serve() as url:
        ask(url, all_of_them)
    sent = {
        path: (headers.get("Authorization"), headers.get("X-Enchtable-Admin-Token"))
        for _, path, headers, _ in replies.requests
    }
    assert sent == {
        STATUS: (f"Bearer {KEY}", None),
        "/enchtable/ready": (None, None),
        "/metrics": (None, None),
        SWAP: (f"Bearer {KEY}", TOKEN),
    }


def test_what_is_not_asked_for_is_not_sent(replies):
    replies.on("POST", SWAP, swapped(OTHER))
    with replies.serve() as url:
        ask(url, lambda client: client.swap("sv-b", expected_epoch=3, persist=True))
    assert replies.bodies(SWAP) == [
        {
            "safety_vector": "sv-b",
            "pause": "keep",
            "dry_run": False,
            "persist": True,
            "expected_epoch": 3,
            "timeout_seconds": 600.0,
        }
    ]


def test_a_refusal_has_the_servers_code_message_and_fix(replies):
    error = refusal(replies, (422, fault("no_plan", "sv-b: expected a plan, got none.", "Plan.")))
    assert (error.status, error.code, error.fix, error.settles_it) == (
        422,
        "no_plan",
        "Plan.",
        True,
    )
    assert "422, no_plan: sv-b: expected a plan, got none. Plan." in str(error)


@pytest.mark.parametrize(
    ("answer", "code", "settles_it", "says"),
    [
        ((401, {"error": "Unauthorized"}), "http_401", True, "--api-key-file"),
        ((404, {"detail": "Not Found"}), "http_404", True, "VLLM_PLUGINS=enchtable"),
        ((502, "<html>Bad Gateway</html>"), "http_502", False, "HTTP 502"),
        ((200, {"outcome": "swapped"}), "http_unknown", False, "versions"),
        ((200, "not JSON \x1b[31m"), "http_unknown", False, "versions"),
        ((503, fault("failed")), "failed", True, "failed"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_answers_of_somebody_else_are_told_apart(replies, answer, code, settles_it, says):
    """Only where the server itself spoke is it known that a swap is not on its way."""
    error = refusal(replies, answer)
    assert (error.code, error.settles_it) == (code, settles_it)
    assert says in str(error)
    assert "\x1b" not in str(error)


def test_a_redirect_is_not_followed(replies):
    elsewhere = Replies()
    elsewhere.on("POST", SWAP, swapped(OTHER))
    with elsewhere.serve() as other:
        error = refusal(replies, (307, {}, {"Location": f"{other}{SWAP}"}))
    assert error.code == "http_307"
    assert "final URL" in str(error)
    assert elsewhere.requests == []


def test_no_answer_is_an_error_of_its_own_and_does_not_tell_the_token(replies):
    replies.on("POST", SWAP, CUT)
    with replies.serve() as url, pytest.raises(Unreachable) as cut:
        ask(url, lambda client: client.swap("sv-b"))
    with pytest.raises(Unreachable) as refused:  # nobody listens there any more
        ask(url, lambda client: client.swap("sv-b"))
    assert TOKEN not in str(cut.value) + repr(cut.value) + str(refused.value)


def test_a_certificate_is_checked_for_the_name_behind_an_address(replies, tmp_path):
    """As with dns+https://, where the URL has an address and the certificate a name."""
    certificate, context = certified(tmp_path, "DNS:vllm.models")
    replies.on("GET", STATUS, status())

    async def epoch(target):
        async with Client(target, Credentials(), ca_file=certificate) as client:
            return (await client.status()).epoch

    with replies.serve(context) as url:
        assert asyncio.run(epoch(Target(url, "vllm.models"))) == 3
        for wrong in (Target(url), Target(url, "other.models")):
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                asyncio.run(epoch(wrong))


def test_an_unreadable_authority_is_refused(tmp_path):
    (tmp_path / "ca").write_text("no certificate")
    for path in (tmp_path / "ca", tmp_path / "none"):
        with pytest.raises(ConfigError, match="--ca-file"):
            Client(Target("https://h"), Credentials(), ca_file=path)


# What becomes of a swap whose answer is lost.


def exchanged(url):
    return ask(url, lambda client: swap(client, "sv-b", None, GOAL, BEFORE, HOW))


@pytest.mark.parametrize("lost", [CUT, (502, "Bad Gateway")], ids=["cut", "gateway"])
def test_a_lost_answer_is_looked_up_and_not_repeated(replies, lost):
    replies.on("POST", SWAP, lost)
    busy = status(state="swapping", ready=False)
    replies.on("GET", STATUS, busy, status(OTHER, epoch=4))
    with replies.serve() as url:
        seen = exchanged(url)
    assert (seen.seen_by, seen.served.epoch) == ("status", 4)
    assert len(replies.bodies(SWAP)) == 1


def test_what_did_not_happen_is_asked_for_again_at_the_same_epoch(replies):
    replies.on("POST", SWAP, CUT, swapped(OTHER))
    replies.on("GET", STATUS, status(), status(OTHER, epoch=4))
    with replies.serve() as url:
        assert exchanged(url).seen_by == "answer"
    assert [body["expected_epoch"] for body in replies.bodies(SWAP)] == [3, 3]


def test_a_late_first_request_is_no_failure_of_the_second(replies):
    """The second is refused because of the first: status, not the refusal, tells."""
    replies.on("POST", SWAP, CUT, (409, fault("wrong_epoch")))
    replies.on("GET", STATUS, status(), status(OTHER, epoch=4))
    with replies.serve() as url:
        assert exchanged(url).seen_by == "status"


def test_somebody_elses_swap_is_noticed(replies):
    replies.on("POST", SWAP, (409, fault("wrong_epoch")))
    replies.on("GET", STATUS, status(OTHER, epoch=4))
    with replies.serve() as url, pytest.raises(ServerRefused) as caught:
        exchanged(url)
    assert caught.value.code == "wrong_epoch"


def test_a_server_that_stays_away_is_given_up(replies):
    replies.on("POST", SWAP, CUT)
    replies.on("GET", STATUS, CUT)
    with replies.serve() as url, pytest.raises(Unreachable):
        exchanged(url)


@pytest.mark.parametrize(
    "said",
    [
        status(OTHER, ready=False, reason="ranks disagree"),
        status(OTHER, disagreeing=1),
        status(),
        status(OTHER, engines=[status()["engines"][0]]),
        status(OTHER | {"beta": 0.4}),
    ],
    ids=["not ready", "disagreeing", "the old one", "a rank with the old one", "another beta"],
)
def test_an_answer_is_not_believed_over_the_status(replies, said):
    replies.on("POST", SWAP, swapped(OTHER))
    replies.on("GET", STATUS, said)
    with replies.serve() as url, pytest.raises(NotAsAsked):
        exchanged(url)


def test_another_merge_than_the_one_that_was_tried_is_a_fault(replies):
    """The vector's files were exchanged between dry run and swap: server and answer agree."""
    forged = OTHER | {"vector_digest": "blake3:ff"}
    replies.on("POST", SWAP, swapped(forged))
    replies.on("GET", STATUS, status(forged, epoch=4))
    with replies.serve() as url, pytest.raises(NotAsAsked):
        exchanged(url)


def test_faults_name_engine_and_rank():
    said = status(OTHER)
    said["engines"].append({"engine": 1, "ranks": [{**said["engines"][0]["ranks"][0], "rank": 2}]})
    said["engines"][1]["ranks"][0]["broken"] = "out of memory"
    assert faults(Status.model_validate(said), GOAL) == [
        "engine 1, rank 2 is broken: out of memory"
    ]
    assert faults(Status.model_validate(status(OTHER)), GOAL) == []


# The way back.


def back(url):
    return ask(url, lambda client: bring_back(client, BEFORE, GOAL, HOW))


def test_the_way_back_is_the_servers_own_rollback(replies):
    changed = status(OTHER, epoch=4, rolls_back_to="sv-a")
    replies.on("GET", STATUS, changed, status(epoch=5))
    replies.on("POST", ROLLBACK, swapped(SERVED, epoch=5, outcome="rolled_back"))
    with replies.serve() as url:
        assert back(url).epoch == 5
    assert replies.bodies(ROLLBACK)[0]["expected_epoch"] == 4


@pytest.mark.parametrize("history", ["none", "refused"])
def test_without_history_the_way_back_is_a_swap_with_the_old_beta(replies, history):
    changed = status(OTHER, epoch=0, rolls_back_to="sv-a" if history == "refused" else None)
    asked = [changed, changed] if history == "refused" else [changed]
    replies.on("GET", STATUS, *asked, status(epoch=1))
    replies.on("POST", ROLLBACK, (422, fault("refused")))
    replies.on("POST", SWAP, swapped(SERVED, epoch=1))
    with replies.serve() as url:
        back(url)
    (body,) = replies.bodies(SWAP)
    assert (body["safety_vector"], body["beta"], body["persist"]) == ("sv-a", 0.5, True)
    assert len(replies.bodies(ROLLBACK)) == (history == "refused")


def test_a_server_that_somebody_else_changed_is_left_alone(replies):
    foreign = OTHER | {"safety_vector": "sv-c", "vector_digest": "blake3:cc"}
    replies.on("GET", STATUS, status(foreign, epoch=7))
    with replies.serve() as url, pytest.raises(NotAsAsked, match="Somebody else"):
        back(url)
    assert {method for method, *_ in replies.requests} == {"GET"}


def test_a_server_that_never_changed_is_left_alone(replies):
    replies.on("GET", STATUS, status())
    with replies.serve() as url:
        assert back(url).safety_vector == "sv-a"
    assert {method for method, *_ in replies.requests} == {"GET"}


def test_a_lost_answer_to_a_rollback_is_looked_up(replies):
    done = {"epoch": 4, "outcome": "rolled_back"}
    replies.on("POST", ROLLBACK, CUT)
    replies.on("GET", STATUS, status(OTHER, epoch=4, swaps=[done]))
    with replies.serve() as url:
        assert ask(url, lambda client: roll_back(client, BEFORE, HOW)).seen_by == "status"
    replies.on("GET", STATUS, status(epoch=3, swaps=[done | {"epoch": 3}]))  # an earlier one
    with replies.serve() as url, pytest.raises(Unreachable):
        ask(url, lambda client: roll_back(client, BEFORE, HOW))


@pytest.mark.parametrize(
    ("desired", "as_desired", "swaps"),
    [
        ({"safety_vector": "sv-b", "beta": 0.4}, False, 1),
        ({"safety_vector": "sv-b", "beta": None}, False, 0),
        ({"safety_vector": "sv-c", "beta": None}, False, 0),
        ({"safety_vector": "sv-a", "beta": None}, True, 0),
        (None, None, 0),
    ],
    ids=["what was given up", "another beta", "somebody else's", "as it is", "no root"],
)
def test_a_root_that_still_names_what_was_given_up_is_written(replies, desired, as_desired, swaps):
    replies.on("GET", STATUS, status(desired=desired, as_desired=as_desired))
    replies.on("POST", SWAP, swapped(SERVED, outcome="unchanged"))
    with replies.serve() as url:
        for before in (None, BEFORE, BEFORE.model_copy(update={"beta_of_plan": True})):
            ask(url, lambda client, b=before: persist_again(client, ("sv-b", 0.4), b, HOW))
    bodies = replies.bodies(SWAP)
    asked = [(body["safety_vector"], body.get("beta"), body["persist"]) for body in bodies]
    assert asked == [("sv-a", 0.5, True), ("sv-a", 0.5, True), ("sv-a", None, True)][: 3 * swaps]
