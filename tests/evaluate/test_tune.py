"""Sweeping β: the arithmetic, and the command on a server whose answers depend on β."""

import json
import signal
import threading
import time

import pytest
from answering import ANSWER, REFUSAL, Answering
from eval_runs import TOKEN, command, inside, start, written

from enchtable_vllm.evaluate.report import Rate, read_report
from enchtable_vllm.evaluate.statistics import mcnemar
from enchtable_vllm.evaluate.tune_choice import Budget, Step, next_beta, propose
from enchtable_vllm.evaluate.tune_page import doubts


def step(beta, unsafe, utility, over_refusal=None):
    return Step(
        beta=beta, folder="f", unsafe=Rate.make(unsafe, 100), worst=Rate.make(unsafe, 100),
        utility=Rate.make(utility, 100),
        over_refusal=None if over_refusal is None else Rate.make(over_refusal, 100),
    )  # fmt: skip


STEPS = [step(None, 95, 76, 0), step(0.3, 68, 78, 4), step(1.0, 13, 76, 4), step(1.2, 8, 75, 10),
         step(2.0, 5, 0, 6)]  # fmt: skip


def test_the_lowest_unsafe_rate_within_the_budget_is_proposed():
    assert propose(STEPS, Budget(0.01)).beta == 1.2
    assert propose(STEPS, Budget(0.0)).beta == 1.0
    assert propose(STEPS, Budget(1.0)).beta == 2.0
    assert propose(STEPS, Budget(0.01, over_refusal=0.05)).beta == 1.0
    assert propose(STEPS, Budget(0.01, over_refusal=0.01)) is None
    assert propose([*STEPS, step(1.1, 8, 80)], Budget(0.01)).beta == 1.1  # of equals the smaller
    silent = step(0.5, 0, 90).model_copy(
        update={"unsafe": Rate.make(0, 1), "worst": Rate.make(99, 100)}
    )
    assert propose([*STEPS, silent], Budget(0.01)).beta == 1.2  # not what no judge can read
    assert doubts(silent) == "99 without a verdict, 99.0% if all were unsafe"
    assert doubts(STEPS[0]) == ""
    unjudged = step(0.5, 0, 90).model_copy(update={"unsafe": Rate.make(0, 0)})
    assert propose([STEPS[0], unjudged], Budget(0.01)) is None


def test_a_search_finds_the_valley():
    """Unsafe falls until β = 1.3, where utility breaks."""
    steps, tried = [step(None, 95, 76)], []
    while (beta := next_beta(steps, Budget(0.02), 0.05, 5.0, 9)) is not None:
        tried.append(beta)
        unsafe = max(5, round(95 - 70 * beta)) if beta < 1.3 else 60
        steps.append(step(beta, unsafe, 76 if beta < 1.3 else 10))
    assert tried[:4] == [0.05, 0.232, 1.08, 5.0]
    assert len(tried) == len(set(tried)) == 9
    assert 1.05 < propose(steps, Budget(0.02)).beta < 1.3


def test_a_search_without_anything_within_the_budget_looks_below():
    steps = [step(None, 95, 76), *(step(b, 50, 10) for b in (0.05, 0.232, 1.08, 5.0))]
    assert 0.05 < next_beta(steps, Budget(0.01), 0.05, 5.0, 6) < 0.232
    assert next_beta(steps, Budget(0.01), 0.05, 5.0, 4) is None


BAD = [f"How is forbidden thing {n} done?" for n in range(24)]
SUMS = [{"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(24)]


LABELS = [
    {"text": REFUSAL, "label": "refusal"}, {"text": "Never.", "label": "refusal"},
    {"text": "Mix flour & water.", "label": "compliance"},
]  # fmt: skip


def rule(prompt, server):
    """The larger β, the fewer unsafe answers; above 1.5 nothing works any more."""
    beta = 0.0 if server.vector == "@none" else server.beta
    if "plus" in prompt:
        number = int(prompt.split(" plus")[0].split()[-1])
        return f"It is {number + (1 if beta < 1.5 else 2)}."
    number = int(prompt.split("thing ")[1].split()[0])
    return REFUSAL if number < 24 * min(beta, 1.0) else ANSWER


@pytest.fixture
def sets(tmp_path):
    return (
        "--safety", written(tmp_path / "bad.json", BAD),
        "--utility", f"gsm8k={written(tmp_path / 'sums.jsonl', SUMS)}",
    )  # fmt: skip


def sweep(url, sets, output, *more):
    return ["tune", "--url", url, "--safety-vector", "sv-b", *sets, "-o", output, *more]


def test_a_sweep_proposes_draws_and_gives_the_server_back(sets, tmp_path):
    output = tmp_path / "sweep"
    server = Answering(rule)
    with server.serve() as url:
        labels = written(tmp_path / "labels.jsonl", LABELS)
        sets = (*sets, "--labelled-refusals", labels)
        asked = sweep(url, sets, output, "--betas", "0.5,1.0,2", "--json")
        out, error = command(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert (server.vector, server.beta) == ("sv-a", 0.5)
        assert [name for name, _ in server.swaps] == ["@none", "sv-b", "sv-b", "sv-b", "sv-a"]
        assert [beta for _, beta in server.swaps] == [None, 0.5, 1.0, 2.0, 0.5]
        assert "goes back to sv-a" in error
        found = json.loads(out)
        assert found["proposed"] == 1.0
        shares = [(s["beta"], s["unsafe"]["share"], s["utility"]["share"]) for s in found["steps"]]
        assert shares[0] == (None, 1.0, 1.0)
        assert 0.2 < shares[1][1] < 0.8
        assert shares[2:] == [(1.0, 0.0, 1.0), (2.0, 0.0, 0.0)]
        half = found["steps"][1]["unsafe"]["count"]  # of β = 0.5, where β = 1 has none
        assert found["alike"] == ([0.5] if mcnemar(half, 0) >= 0.05 else [])
        count = found["steps"][0]["unsafe"]["of"]
        assert 4 <= count <= 20  # the validation split
        page = (output / "index.html").read_text()
        assert "Proposed: beta 1" in page
        judged = "Judge: patterns, precision 100.0%, recall 50.0% on 3 labelled answers."
        assert judged in page
        assert "one answer is more than the budget of 1.0%" in page
        assert page.count("<circle") == 6
        assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert (output / "beta-1" / "report.json").is_file()

        first, swaps = len(server.asked), len(server.swaps)
        code, out = inside(*asked[:-1], ENCHTABLE_ADMIN_TOKEN=TOKEN)  # again: all is there
        assert code == 0
        assert (len(server.asked), len(server.swaps)) == (first, swaps)
        assert "beta 0.5" in out
        assert judged.removesuffix(".") in " ".join(out.split())
        keep = sweep(url, sets, output, "--betas", "0.5,1.0,2", "--keep", "--utility-budget", "0.5")
        assert inside(*keep, ENCHTABLE_ADMIN_TOKEN=TOKEN)[0] == 0
        assert (server.vector, server.beta) == ("sv-b", 1.0)
        assert "more than the budget" not in (output / "index.html").read_text()
        other = sweep(url, sets, output, "--betas", "0.5", "--limit", "3")
        code, error = inside(*other, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert code == 1
        assert "another set, sample, judge or setting" in error
        # Of what was measured, only what is asked for may win.
        fewer = [*asked[:-1], "--betas", "0.5"]
        code, out = inside(*fewer, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert code == 0
        assert json.loads((output / "tune.json").read_text())["proposed"] == 0.5
        server.remade = "anew"
        code, error = inside(*asked[:-1], ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert code == 1
        assert "another task model, vector or plan under the same name" in error
        server.remade, server.root_plan = "", "anew"
        code, error = inside(*asked[:-1], ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert code == 1
        assert "another task model, vector or plan under the same name" in error
        server.root_plan = ""
        code, error = inside(*asked[:-1], "--model", "other", ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert code == 1
        assert "another set, sample, judge or setting" in error


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_sweep_gives_the_server_back_and_goes_on(sets, tmp_path, how):
    output = tmp_path / "sweep"
    reached = threading.Event()
    server = Answering()
    slow = [True]

    def answering(prompt, _):
        if slow[0] and server.vector == "sv-b" and "thing" in prompt:
            reached.set()
            time.sleep(1.0)
        return rule(prompt, server)

    server.rule = answering
    with server.serve() as url:
        asked = sweep(url, sets, output, "--betas", "1.0")
        with start(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN) as process:
            assert reached.wait(120)
            process.send_signal(how)
            said = process.communicate(timeout=120)
        assert process.returncode == 128 + how, said
        assert (server.vector, server.beta) == ("sv-a", 0.5)
        assert json.loads((output / "tune.json").read_text())["restored"] is True
        slow[0] = False
        first = len(server.swaps)
        command(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert [name for name, _ in server.swaps[first:]] == ["sv-b", "sv-a"]  # @none was measured


def test_a_killed_sweep_is_made_good_by_the_next(sets, tmp_path):
    output = tmp_path / "sweep"
    reached = threading.Event()
    server = Answering()

    def answering(prompt, _):
        if server.vector == "sv-b":
            reached.set()
            time.sleep(0.2)
        return rule(prompt, server)

    server.rule = answering
    with server.serve() as url:
        asked = sweep(url, sets, output, "--betas", "1.0")
        with start(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN) as process:
            assert reached.wait(120)
            process.kill()
            process.communicate(timeout=120)
        assert (server.vector, server.beta) == ("sv-b", 1.0)
        server.rule = rule
        command(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert (server.vector, server.beta) == ("sv-a", 0.5)


def test_a_judge_model_judges_every_step(sets, tmp_path):
    """Each step has an event loop of its own, and the judge's connections are not lost with it."""
    judge = Answering()

    def judging(answer, _):
        (*_, body) = (body for path, body in judge.bodies if path == "/v1/chat/completions")
        assert [turn["role"] for turn in body["messages"]] == ["user", "assistant"]
        return "unsafe\nS1" if answer.startswith("Sure") else "safe" if "thing 2" in str(
            body["messages"][0]) else "I cannot say"  # fmt: skip

    judge.rule = judging
    server = Answering(rule)
    with server.serve() as url, judge.serve() as judge_url:
        asked = sweep(
            url, sets, tmp_path / "sweep", "--betas", "1.0", "--judge", "llama-guard-3",
            "--judge-url", judge_url, "--judge-model", "guard", "--connections", "1",
        )  # fmt: skip
        command(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    before, after = (
        read_report(tmp_path / "sweep" / name).kind("safety")[0] for name in ("no-vector", "beta-1")
    )
    assert before.main.share == 1.0
    assert before.unparseable == 0
    assert after.main.count == 0
    assert after.unparseable > 0
    assert after.main.of + after.unparseable == len(after.samples) == before.main.of
    assert after.worst.count == after.unparseable
    assert judge.bodies[0][1]["model"] == "guard"


def test_a_vector_that_the_server_does_not_have_changes_nothing(sets, tmp_path):
    server = Answering(rule)
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1", "--safety-vector", "sv-z")
        code, error = inside(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert code == 1
    assert "no 'sv-z'" in error
    assert server.swaps == []


def test_a_failing_step_gives_the_server_back_by_history_if_its_name_is_gone(sets, tmp_path):
    server = Answering()

    def answering(prompt, _):
        server.refused_vectors.add("sv-a")  # its folder was taken away meanwhile
        server.broken.add(prompt)
        return rule(prompt, server)

    server.rule = answering
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1.0", "--retries", "0",
                      "--limit", "2", "--allow-failed", "0")  # fmt: skip
        server.broken = set(BAD)
        _, error = command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert "EvaluationError" in error
    assert (server.vector, server.beta) == ("sv-a", 0.5)


def test_a_failing_step_gives_the_server_back_by_history_if_its_plan_was_replaced(sets, tmp_path):
    server = Answering()

    def answering(prompt, _):
        server.root_plan = "anew"  # under the same name
        return rule(prompt, server)

    server.rule, server.broken = answering, set(BAD)
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1.0", "--retries", "0",
                      "--limit", "2")  # fmt: skip
        command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert (server.vector, server.beta, server.plan) == ("sv-a", 0.5, "")


def test_what_could_not_be_given_back_by_its_name_is_not_swept(sets, tmp_path):
    """Started with a plan of its own, say, or from a folder outside of the root."""
    server = Answering(rule)
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1")
        server.root_plan = "anew"
        code, error = inside(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert (code, "another vector or plan under that name" in error) == (1, True)
        server.root_plan, server.refused_vectors = "", {"sv-a"}
        code, error = inside(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
        assert (code, "to be able to give it back" in error) == (1, True)
    assert server.swaps == []


@pytest.mark.parametrize("vector", ["sv-b", f"org/sv@{'0' * 40}"])
def test_a_server_that_serves_another_beta_than_asked_for_is_not_measured(sets, tmp_path, vector):
    server = Answering(rule)
    server.deaf = True
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1", "--limit", "2",
                      "--safety-vector", vector)  # fmt: skip
        _, error = command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert "NotAsAsked" in error
    assert (server.vector, server.beta) == ("sv-a", 0.5)


def test_a_server_that_failed_is_not_taken_for_given_back(sets, tmp_path):
    """It says that it serves what it did, and serves nobody."""
    server = Answering(rule)
    server.dies_in = "@none"
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1", "--limit", "2")
        command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert [name for name, _ in server.swaps] == ["@none", "sv-a"]
    assert server.state == "serving"


def test_a_rank_that_did_not_come_back_with_the_others_is_said(sets, tmp_path):
    """The first rank's word is not enough."""
    server = Answering(rule)
    server.dissents_after = "sv-b"
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--betas", "1", "--limit", "2")
        _, error = command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert "it to serve again what it did" in error
    assert "disagree" in error
    assert json.loads((tmp_path / "sweep" / "tune.json").read_text())["restored"] is False


def test_a_judge_that_is_not_there_is_named_before_the_first_swap(sets, tmp_path):
    server = Answering(rule)
    with server.serve() as url:
        asked = sweep(
            url, sets, tmp_path / "sweep", "--betas", "1.0", "--judge", "llama-guard-3",
            "--judge-url", f"{url}/nowhere", "--judge-model", "guard",
        )  # fmt: skip
        _, error = command(*asked, code=1, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert "judge 'guard' at " in error
    assert server.swaps == []
    assert not (tmp_path / "sweep" / "tune.json").exists()


def test_a_search_in_another_range_measures_there(sets, tmp_path):
    server = Answering(rule)
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", "--search", "--steps", "2", "--limit", "2")
        for bounds in ("0.1,0.3", "0.5,1.2"):
            command(*asked, "--range", bounds, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    found = json.loads((tmp_path / "sweep" / "tune.json").read_text())
    assert [step["beta"] for step in found["steps"]] == [None, 0.1, 0.3, 0.5, 1.2]
    assert found["proposed"] in (0.5, 1.2)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ((), 2, "--betas, --search"),
        (("--betas", "1", "--search"), 2, "--betas, --search"),
        (("--betas", "0"), 2, "positive"),
        (("--betas", "a"), 2, "numbers"),
        (("--search", "--range", "3,1,2"), 2, "--range"),
        (("--betas", "1", "--safety-vector", "@current"), 2, "--safety-vector"),
        (("--betas", "1", "--over-refusal-budget", "0.1"), 2, "--harmless"),
        (("--betas", "1", "--utility", "chess"), 1, "humaneval, gsm8k, medmcqa"),
    ],
)
def test_what_cannot_be_swept_is_inside(sets, tmp_path, more, code, words):
    server = Answering(rule)
    with server.serve() as url:
        asked = sweep(url, sets, tmp_path / "sweep", *more)
        found, error = inside(*asked, ENCHTABLE_ADMIN_TOKEN=TOKEN)
    assert found == code
    assert words in error
    assert server.bodies == []


def test_a_sweep_wants_the_admin_token_first(sets, tmp_path):
    server = Answering(rule)
    with server.serve() as url:
        code, error = inside(*sweep(url, sets, tmp_path / "s", "--betas", "1"))
    assert code == 1
    assert "--admin-token-file" in error
    assert server.bodies == []
