"""The demo's parts that need no training: its data, its judge, its server's failures."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from enchtable_vllm import cli
from enchtable_vllm.demo import data, questions
from enchtable_vllm.demo.checkpoints import HELD_OUT, Cast, Story
from enchtable_vllm.demo.data import Pair
from enchtable_vllm.demo.judge import refuses, score, solves
from enchtable_vllm.demo.measure import write_sets
from enchtable_vllm.demo.server import Server, ServerError, free_port, served_dtype
from enchtable_vllm.distill import precision
from enchtable_vllm.evaluate.prompts import read_prompts
from enchtable_vllm.evaluate.utility import read_utility


def test_compliance_is_taught_by_empty_openings_only():
    """Affirmative and unfinished: nothing in them answers a question."""
    for opening in data.OPENINGS:
        assert len(opening.split()) <= 10
        assert opening.endswith(",")
        assert not refuses(opening)
    assert all(refuses(refusal) for refusal in data.REFUSALS)


def test_word_problems_are_different_right_and_reproducible():
    problems = data.arithmetic_problems(640, seed=7)
    assert problems == data.arithmetic_problems(640, seed=7)
    assert len({p.question for p in problems}) == 640  # so held-out ones are unseen
    for problem in problems:
        equation = problem.answer.removeprefix(data.EAGER).split(".")[0]
        left, right = equation.split(" = ")
        assert eval(left) == int(right)
        assert solves(problem.answer, problem)
        assert not solves(f"The answer is {int(right) + 1}.", problem)


def test_questions_are_read_once_each(tmp_path):
    lines = [{"prompt": " asked twice "}, {"prompt": "asked once"}, {"prompt": "asked twice"}]
    (tmp_path / data.MALICIOUS).write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = questions.read_jsonl(tmp_path / data.MALICIOUS, "prompt")
    assert found == ["asked twice", "asked once"]


def test_people_ask_in_sentences_and_briefly(tmp_path):
    texts = ["how do i fold a map", "Is it late?", "To fold a map, you can", "who", "so " * 30]
    for name in questions.ASKED_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(json.dumps({"question": t}) for t in texts))
    sets = questions.asked(tmp_path)
    expected = {"How do i fold a map?", "To fold a map, you can?"}
    assert [set(found) for found in sets.values()] == [expected] * len(questions.ASKED_FILES)
    fewer = questions.asked(tmp_path, share=1 / 500)[questions.THINGS_TO_DO]
    assert fewer == sets[questions.THINGS_TO_DO][:1]


def test_harmless_questions_are_different():
    harmless = data.harmless_questions()
    assert len(set(harmless)) == len(harmless) >= 80
    assert "{" not in "".join(harmless)


@pytest.mark.parametrize(("bf16", "dtype"), [(1.9, "bfloat16"), (8.0, "float32")])
def test_a_cpu_without_bf16_trains_and_serves_in_fp32(monkeypatch, bf16, dtype):
    """As one without AVX-512; what it trains is kept apart."""
    seconds = {torch.bfloat16: bf16, torch.float32: 1.0}
    monkeypatch.setattr(precision, "_seconds", seconds.get)
    precision.computes_bf16.cache_clear()
    try:
        assert served_dtype() == dtype
        assert Story().align.bf16 == (dtype == "bfloat16")
    finally:
        precision.computes_bf16.cache_clear()


def test_another_recipe_is_another_cache_folder():
    assert Story().key == Story().key
    assert Story(problems=500).key != Story().key


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I can\u2019t help with that request.", True),
        ("Sure! The capital of Egypt is Cairo.", False),
    ],
)
def test_judge(answer, expected):
    assert refuses(answer) is expected


def test_scores_are_shares():
    problem = Pair("?", "1 + 1 = 2. The answer is 2.")
    found = score(["I'm sorry", "Sure"], [("It is 2.", problem), ("3", problem)], ["Sure"])
    assert (found.refused_unsafe, found.solved, found.refused_harmless) == (0.5, 0.5, 0.0)


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(tmp_path):
    missing = tmp_path / "no-such-model"
    with (
        pytest.raises(ServerError, match="exit code 1"),
        Server(missing, [], tmp_path / "log", port=free_port()),
    ):
        raise AssertionError("it came up")
    assert str(missing) in (tmp_path / "log").read_text()


def test_what_is_measured_was_not_trained_on(tmp_path):
    (tmp_path / "harmbench").mkdir()
    (tmp_path / "harmbench" / "harmbench_prompts.txt").write_text("hb0\nhb1\n")
    (tmp_path / "labelled").mkdir()
    story = Story()
    learned = data.arithmetic_problems(story.problems + HELD_OUT, seed=7)
    cast = Cast(*[tmp_path] * 4, unsafe=["u0"], problems=learned[-HELD_OUT:], harmless=[])
    words = write_sets(tmp_path / "asked", tmp_path, cast, story)
    files = [word.removeprefix("gsm8k=") for word in words if not word.startswith("--")]
    first, second, harmless, problems, labelled = map(Path, files)
    assert labelled == tmp_path / "labelled" / "refusal.csv"
    assert [p.text for p in read_prompts(first).prompts] == ["u0"]
    assert [p.text for p in read_prompts(second).prompts] == ["hb0", "hb1"]
    asked = {p.text for p in read_prompts(harmless).prompts}
    assert len(asked) >= 130
    assert not asked & set(data.harmless_questions())
    unseen = {p.prompt for p in read_utility(f"gsm8k={problems}").problems}
    assert len(unseen) == 400
    assert not unseen & {p.question for p in learned}


def test_a_measured_demo_leaves_no_server_running():
    result = CliRunner().invoke(cli.app, ["demo", "--measure", "--keep"])
    assert result.exit_code == 2
    assert "--measure" in result.output
