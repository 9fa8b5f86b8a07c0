"""Medicine: questions with four choices.

Source: A. Pal et al., "MedMCQA", CHIL 2022. Two forms: the published one (``question``, ``opa``
to ``opd``, ``cop``), and conversations with an ``ideal`` answer, as collections of evaluations
keep them. ``cop`` is a letter, or a number from 1 (as first published) or from 0 (as on the Hub):
which of the two, the whole file tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.report import Verdict
from enchtable_vllm.evaluate.utility.problems import Carrier, Problem, ProblemSet, read_problems

_CARRIER = Carrier("evals", "evals", "registry/data/medmcqa/samples.jsonl")
_LETTERS = "ABCD"
_INSTRUCTION = "Answer with the letter of the right choice."
#: What follows a letter that is no choice: the rest of a word, as in D-dimer, or of a name, as in
#: C. difficile.
_END = r"(?![\w'-])(?!\.\s*[a-z])"
_FIRST = re.compile(rf"^\W*([A-Da-d]){_END}(?:[).:,*]|\s*$|[ \t]*\n|\s+(?=[A-Z\d(]))")
_SAID = re.compile(
    r"\b(?i:answer|option|choice)\b[^.\n]{0,60}?(?:\b(?i:is)\b|:)[\s*(\"']*"
    rf"([A-D]|[b-d]|a(?!\s+\w)){_END}"
)
_NAMED = re.compile(rf"\b(?i:option|choice)\s+[(*]?([A-D]){_END}")
#: A choice as it is asked.
_CHOICE = re.compile(r"^([A-D])[).:]\s*(\w+)", re.M)
_ALONE = re.compile(rf"(?:^|[\s(*])([A-D]){_END}(?:[).:,*]|\s*$)|\b([a-d])\)")


def read(file: Path | None) -> ProblemSet:
    """The problems.

    Raises:
        PromptSetError: Besides what is wrong with a file: its choices are numbers, and whether
            they begin at 0 or at 1 cannot be told.
    """
    found = read_problems("medmcqa", file, _CARRIER, _understand)
    numbers = {int(p.key["number"]) for p in found.problems if "number" in p.key}
    if not numbers:
        return found
    if (0 in numbers) == (len(_LETTERS) in numbers):
        raise PromptSetError(
            f"problems of medmcqa, {found.source}",
            expected="right choices that are letters, or numbers from 0 to 3, or from 1 to 4",
            got=f"the numbers {sorted(numbers)}",
            fix="Write them as letters.",
        )
    first = 0 if 0 in numbers else 1
    problems = (
        replace(p, key={"letter": _LETTERS[int(p.key["number"]) - first]})
        if "number" in p.key
        else p
        for p in found.problems
    )
    return replace(found, problems=tuple(problems))


def mark(problem: Problem, answer: str) -> Verdict:
    """Whether the letter is the right one."""
    letter = chosen_letter(_unmistakable(problem.prompt, answer))
    if letter is None:
        return "unparseable"
    return "correct" if letter == problem.key["letter"] else "wrong"


def _unmistakable(question: str, answer: str) -> str:
    """An answer whose letters are marked as choices where their own words follow: B. aspirin."""
    for letter, word in _CHOICE.findall(question):
        named = rf"(?<![\w'-]){letter}\s*[-–—.:]\s*(?={re.escape(word)}\b)"
        answer = re.sub(named, f"{letter}) ", answer, flags=re.I)
    return answer


def chosen_letter(text: str) -> str | None:
    """The choice: what is last called the answer, or the letter it opens with, or the only one."""
    if said := _SAID.findall(text):
        return str(said[-1]).upper()
    if (first := _FIRST.search(text)) and not re.match(r"^\W*a\s+\w", text, re.I):  # "A cell ..."
        return first[1].upper()
    for pattern in (_NAMED, _ALONE):
        found = {"".join(groups).upper() for groups in pattern.findall(text)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _understand(record: Mapping[str, Any], place: int) -> Problem:
    if "input" in record:
        turns = [turn["content"] for turn in record["input"] if turn["role"] == "user"]
        question, right = "\n\n".join(turns), chosen_letter(str(record["ideal"]))
    else:
        choices = [record[f"op{letter}"] for letter in "abcd"]
        lines = [f"{letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
        question = "\n".join([record["question"], "", *lines])
        right = str(record["cop"]).strip().upper()
    if not question.strip():
        raise ValueError("no question")
    if right in tuple(_LETTERS):
        key = {"letter": str(right)}
    elif right in ("0", "1", "2", "3", "4"):
        key = {"number": str(right)}
    else:
        raise ValueError("no right choice among the four")
    category = record.get("subject_name", record.get("subject", ""))
    name = str(record.get("id", f"medmcqa-{place}"))
    return Problem(name, question, _INSTRUCTION, key, str(category or ""))
