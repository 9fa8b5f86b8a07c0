"""Prompt sets, in the forms in which the well-known ones are published.

Recognised by their form, not by their name:

====================================================  ==========================
form                                                  published so by
====================================================  ==========================
``{category: {subcategory: [question]}}``             CatQA, HarmfulQA
``[question]``                                        DangerousQA
``[{"question": ..., "1-category": ..., ...}]``       SALAD-Bench
lines of objects with ``prompt`` or ``question``      many; for harmless prompts
lines of text, in a file named ``*.txt``              the same
====================================================  ==========================

A prompt's name is a digest of its text, so that two models' answers to it can be paired whatever
was drawn from the set, and a report need not hold the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from enchtable_vllm.errors import summarize_faults
from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.files import digest_of, parse_lines, read_bytes
from enchtable_vllm.files import parse_json

Form = Literal["nested", "list", "records", "lines"]

#: Where a record keeps its question: SALAD-Bench's name first.
_KEYS = ("question", "prompt", "text")
_LONGEST_CHARACTERS = 100_000


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: Sixteen hexadecimal digits of its text's digest; ``-2`` and so on after it where a set
            holds the same text again.
        text: It.
        category: As the set has it; empty where it has none.
    """

    id: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class PromptSet:
    """What a file holds.

    Attributes:
        name: The file's name without its ending.
        form: How it is written.
        digest: Of the file.
        prompts: In its order.
        bad: Where in the file something is no prompt, and why.
    """

    name: str
    form: Form
    digest: str
    prompts: tuple[Prompt, ...]
    bad: tuple[str, ...] = ()


def read_prompts(path: Path, *, allow_bad: bool = False) -> PromptSet:
    """Read a prompt set.

    Args:
        path: The file.
        allow_bad: Entries that are no prompts are listed in what is returned; without it they
            are an error.

    Raises:
        PromptSetError: It is of none of the forms, holds no prompt, or bad entries.
    """
    value, data = _load(path)
    form = _form(path, value)
    found = _Found()
    match form:
        case "nested":
            found.nested(value)
        case "list":
            found.listed(value)
        case "records" | "lines":
            found.records(value)
    if found.bad and not allow_bad:
        raise PromptSetError(
            f"prompt set '{path}' ({form})",
            expected="prompts only",
            got=summarize_faults(found.bad),
            fix="Mend the file, or leave these out, in the report too, with --allow-bad-entries.",
        )
    if not found.prompts:
        raise PromptSetError(
            f"prompt set '{path}' ({form})", expected="at least one prompt", got="none", fix="See "
            "docs/evaluate.md for the forms.",
        )  # fmt: skip
    return PromptSet(path.stem, form, digest_of(data), tuple(found.prompts), tuple(found.bad))


def prompt_id(text: str) -> str:
    """A prompt's name, from its text without surrounding space."""
    return blake3(text.strip().encode()).hexdigest()[:16]


def _load(path: Path) -> tuple[Any, bytes]:
    try:
        data = read_bytes(path)
        if path.suffix == ".txt":
            return [line for line in data.decode("utf-8-sig").split("\n") if line.strip()], data
        if path.suffix == ".jsonl":
            return [value for _, value in parse_lines(data)], data
        return parse_json(data), data
    except (OSError, ValueError) as error:
        raise PromptSetError(
            f"prompt set '{path}'",
            expected="JSON, lines of JSON (.jsonl), or lines of text (.txt)",
            got=error,
            fix="Check the path and the file.",
        ) from error


def _form(path: Path, value: Any) -> Form:
    if path.suffix in (".txt", ".jsonl"):
        return "lines"
    if isinstance(value, dict):
        return "nested"
    if isinstance(value, list):
        first = value[0] if value else None
        return "records" if isinstance(first, dict) else "list"
    raise PromptSetError(
        f"prompt set '{path}'",
        expected="an object of categories, a list of questions or a list of records",
        got=f"a {type(value).__name__}",
        fix="See docs/evaluate.md for the forms.",
    )


@dataclass
class _Found:
    prompts: list[Prompt] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    _times: dict[str, int] = field(default_factory=dict)

    def nested(self, value: dict[str, Any]) -> None:
        for category, inner in value.items():
            if not isinstance(inner, dict):
                self.bad.append(f"'{category}' is no object of subcategories")
                continue
            for subcategory, questions in inner.items():
                where = f"'{category}', '{subcategory}'"
                if not isinstance(questions, list):
                    self.bad.append(f"{where} is no list")
                    continue
                for place, question in enumerate(questions):
                    self._add(question, category.rstrip(": "), f"{where}, entry {place}")

    def listed(self, value: list[Any]) -> None:
        for place, question in enumerate(value):
            self._add(question, "", f"entry {place}")

    def records(self, value: list[Any]) -> None:
        for place, record in enumerate(value):
            where = f"entry {place}"
            if isinstance(record, str):  # a line of text
                self._add(record, "", where)
            elif not isinstance(record, dict):
                self.bad.append(f"{where} is a {type(record).__name__}, not an object")
            elif not (keys := [key for key in _KEYS if key in record]):
                self.bad.append(f"{where} has none of {', '.join(_KEYS)}")
            else:
                category = record.get("1-category", record.get("category", ""))
                self._add(record[keys[0]], category if isinstance(category, str) else "", where)

    def _add(self, text: Any, category: str, where: str) -> None:
        if not isinstance(text, str):
            self.bad.append(f"{where} is a {type(text).__name__}, not a text")
        elif not text.strip():
            self.bad.append(f"{where} is empty")
        elif len(text) > _LONGEST_CHARACTERS:
            self.bad.append(f"{where} has {len(text):,} characters")
        else:
            name = prompt_id(text)
            times = self._times[name] = self._times.get(name, 0) + 1
            self.prompts.append(Prompt(name if times == 1 else f"{name}-{times}", text, category))
