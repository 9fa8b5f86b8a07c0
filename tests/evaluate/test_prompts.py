"""Prompt sets: every form, every way to be wrong; samples and splits. All prompts are made up."""

import json

import pytest

from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.prompts import Prompt, prompt_id, read_prompts
from enchtable_vllm.evaluate.sampling import choose

NESTED = {"Gardening": {"Roses:": ["How do roses grow?", "When do roses bloom?"]},
          "Cooking:": {"Soup": ["How is soup made?"]}}  # fmt: skip
RECORDS = [
    {"qid": 7, "question": "How do roses grow?", "source": "made up", "1-category": "O1: Plants",
     "2-category": "O2: Flowers", "3-category": "O3: Roses"},
    {"qid": 9, "question": "How is soup made?", "source": "made up", "1-category": "O2: Food",
     "2-category": "x", "3-category": "y"},
]  # fmt: skip


def written(tmp_path, value, name="set.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("name", "value", "form", "categories"),
    [
        ("set.json", NESTED, "nested", ["Gardening", "Gardening", "Cooking"]),
        ("set.json", ["How do roses grow?", "Why?"], "list", ["", ""]),
        ("set.json", RECORDS, "records", ["O1: Plants", "O2: Food"]),
        ("set.jsonl", '{"prompt": "Why?", "category": "c"}\n\n{"question": "How?"}\n', "lines",
         ["c", ""]),
        ("set.txt", "Why?\n\nHow?\n", "lines", ["", ""]),
    ],
    ids=["nested", "list", "records", "jsonl", "txt"],
)  # fmt: skip
def test_every_form_is_recognised(tmp_path, name, value, form, categories):
    found = read_prompts(written(tmp_path, value, name))
    assert (found.name, found.form, found.bad) == ("set", form, ())
    assert [prompt.category for prompt in found.prompts] == categories
    assert all(prompt.id == prompt_id(prompt.text) for prompt in found.prompts)
    assert found.digest.startswith("blake3:")


def test_the_same_text_has_the_same_name_in_every_form(tmp_path):
    first = read_prompts(written(tmp_path, NESTED)).prompts[0]
    second = read_prompts(written(tmp_path, RECORDS)).prompts[0]
    assert first.text == second.text
    assert first.id == second.id


def test_a_text_twice_is_two_prompts(tmp_path):
    one, two = read_prompts(written(tmp_path, ["Why?", " Why?\n"])).prompts
    assert two.id == f"{one.id}-2"


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (["Why?", 3], "entry 1 is a int"),
        (["Why?", "  "], "entry 1 is empty"),
        (["Why?", {"question": "How?"}], "entry 1 is a dict"),
        ({"a": {"b": ["Why?", None]}}, "'a', 'b', entry 1 is a NoneType"),
        ({"a": {"b": "Why?"}, "c": {"d": ["How?"]}}, "'a', 'b' is no list"),
        ({"a": ["Why?"], "c": {"d": ["How?"]}}, "'a' is no object"),
        ([{"question": "Why?"}, {"qid": 3}], "entry 1 has none of question, prompt, text"),
        ([{"question": "Why?"}, {"question": ["How?"]}], "entry 1 is a list"),
        ([{"question": "Why?"}, "How?", 4], "entry 2 is a int"),
        (["Why?", "x" * 100_001], "entry 1 has 100,001 characters"),
    ],
)
def test_bad_entries_are_an_error_or_a_list(tmp_path, value, where):
    path = written(tmp_path, value)
    with pytest.raises(PromptSetError) as caught:
        read_prompts(path)
    assert where in str(caught.value)
    assert "--allow-bad-entries" in str(caught.value)
    found = read_prompts(path, allow_bad=True)
    assert [where in bad for bad in found.bad] == [True]
    assert found.prompts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("set.json", "[1, 2"),
        ("set.json", "3"),
        ("set.json", "[]"),
        ("set.json", "{}"),
        ("set.json", '{"a": {}, "a": {}}'),
        ("set.jsonl", '{"prompt": "Why?"}\n{'),
        ("set.txt", "\n"),
    ],
)
def test_what_is_no_prompt_set_is_refused(tmp_path, name, value):
    with pytest.raises(PromptSetError):
        read_prompts(written(tmp_path, value, name), allow_bad=True)
    with pytest.raises(PromptSetError):
        read_prompts(tmp_path / "nothing.json")


PROMPTS = [Prompt(prompt_id(f"Question {n}?"), f"Question {n}?") for n in range(400)]


def chosen(**options):
    options = {"limit": None, "seed": 1} | options
    return choose(PROMPTS, lambda prompt: prompt.id, **options)


def test_a_larger_sample_holds_the_smaller_one_in_the_sets_order():
    small, large = chosen(limit=20), chosen(limit=60)
    assert len(small) == 20
    assert set(small) < set(large)
    assert [p for p in PROMPTS if p in small] == small
    assert small != PROMPTS[:20]
    assert chosen(limit=20, seed=2) != small


def test_a_split_is_two_sides_and_copies_stay_together():
    validation, test = chosen(split="validation"), chosen(split="test")
    assert sorted(p.id for p in validation + test) == sorted(p.id for p in PROMPTS)
    assert 160 < len(validation) < 240
    few = chosen(split="validation", validation_share=0.1)
    assert set(few) < set(validation)
    copies = [Prompt(f"{p.id}-2", p.text) for p in PROMPTS]
    sides = choose(copies, lambda p: p.id, limit=None, seed=1, split="validation")
    assert [p.text for p in sides] == [p.text for p in validation]


def test_numbered_problems_are_split_too():
    names = [f"gsm8k-{n}" for n in range(100)]
    sides = [choose(names, str, limit=None, seed=0, split=side) for side in ("validation", "test")]
    assert all(30 < len(side) < 70 for side in sides)
