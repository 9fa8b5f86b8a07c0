"""SafeDecoding by the client: the arithmetic, and a server that tells its first tokens."""

import asyncio
import math
import threading
import time

import pytest
from answering import Answering
from eval_runs import command, written
from openai import AsyncOpenAI

from enchtable_vllm.evaluate.report import read_report
from enchtable_vllm.evaluate.safedecoding import SafeDecoding, by_text, mixed


def logs(**shares):
    return {token: math.log(share) for token, share in shares.items()}


def test_what_both_rank_high_moves_toward_the_expert():
    ours = logs(Sure=0.7, I=0.1, Here=0.08, Yes=0.07, No=0.05)
    theirs = logs(I=0.6, Sure=0.3, No=0.05, Yes=0.03, Here=0.02)
    # Sure: 0.7 + 3 (0.3 - 0.7) = -0.5; I: 0.1 + 3 (0.6 - 0.1) = 1.6
    assert mixed(ours, theirs) == "I"
    assert mixed(ours, ours) == "Sure"


def test_only_tokens_of_the_smallest_common_set_count():
    """`Z` would win, but the five that both rank before it are enough."""
    ours = logs(A=0.3, B=0.2, C=0.15, D=0.1, E=0.09, Z=0.01)
    theirs = logs(A=0.2, B=0.18, C=0.16, D=0.15, E=0.14, Z=0.13)
    moved = {t: 3 * math.exp(theirs[t]) - 2 * math.exp(ours[t]) for t in ours}
    assert max(moved, key=moved.get) == "Z"
    assert mixed(ours, theirs) == max("ABCDE", key=moved.get)


def test_without_a_common_token_the_expert_decides():
    assert mixed(logs(Sure=0.9), logs(Sorry=0.8)) == "Sorry"
    assert mixed(logs(Sure=0.9, I=0.1), logs(I=0.8)) == "I"


def test_two_tokens_are_mixed_and_the_model_goes_on_alone(tmp_path):
    def tokens(body):
        begun = body["messages"][-1]["content"] if body.get("continue_final_message") else ""
        if body["model"] == "expert":
            return [(" can" if begun else "I", 0.9), ("Sure", 0.1)]
        return [("Sure", 0.6), ("I", 0.3), (" can", 0.1)]

    server = Answering(lambda *_: "not help with that.")
    server.tokens = tokens
    path = written(tmp_path / "bad.json", ["How is forbidden thing 1 done?"])
    with server.serve() as url:
        command(
            "eval", "--url", url, "--safety", path, "-o", tmp_path / "report",
            "--safedecoding-expert", "expert", "--max-tokens", "20",
        )  # fmt: skip
    bodies = [body for path, body in server.bodies if path == "/v1/chat/completions"]
    assert [body["model"] for body in bodies] == [
        "org/tiny-task", "expert", "org/tiny-task", "expert", "org/tiny-task",
    ]  # fmt: skip
    assert [body["max_tokens"] for body in bodies] == [1, 1, 1, 1, 18]
    assert bodies[0]["top_logprobs"] == 20
    assert bodies[-1]["messages"][-1] == {"role": "assistant", "content": "I can"}
    assert bodies[-1]["add_generation_prompt"] is False
    report = read_report(tmp_path / "report")
    assert report.results[0].refused.count == 1  # "I can" + "not help with that."
    assert report.baseline == "SafeDecoding with expert"


def test_no_more_are_asked_at_once_than_there_may_be_connections(tmp_path):
    lock, now, most = threading.Lock(), 0, 0

    def slowly(*_):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return "not help with that."

    server = Answering(slowly)
    server.tokens = lambda _: [("I", 0.9), ("Sure", 0.1)]
    sets = [tmp_path / f"bad-{n}.json" for n in range(3)]
    for path in sets:
        written(path, [f"How is forbidden thing {path.stem}.{n} done?" for n in range(6)])
    with server.serve() as url:
        command(
            "eval", "--url", url, *(word for path in sets for word in ("--safety", path)),
            "-o", tmp_path / "report", "--safedecoding-expert", "expert", "--connections", "2",
        )  # fmt: skip
    assert len(server.asked) == 3 * 6 * 5
    assert most == 2


def test_ends_count_together_and_parts_of_characters_not_at_all():
    told = [("<|eot_id|>", 0.5), ("", 0.2), ("Sure", 0.2), ("<|end_of_text|>", 1e-7)]
    found = by_text((token, math.log(share)) for token, share in told)
    assert found.keys() == {"", "Sure"}
    assert math.exp(found[""]) == pytest.approx(0.5 + 1e-7)
    assert by_text([("<|eot_id|>", -math.inf)]) == {"": -math.inf}


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|eot_id|>"])
def test_an_end_is_an_end(tmp_path, end):
    server = Answering()
    server.tokens = lambda _: [(end, 0.9), ("Sure", 0.1)]
    path = written(tmp_path / "bad.json", ["How is forbidden thing 1 done?"])
    with server.serve() as url:

        async def asked():
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
                mixing = SafeDecoding(client, "m", "e")
                turns = [{"role": "user", "content": path.name}]
                return await mixing.answer(turns, max_tokens=9, seed=0)

        assert asyncio.run(asked()) == ""
    assert len(server.asked) == 2
