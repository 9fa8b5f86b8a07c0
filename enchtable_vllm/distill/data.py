"""Training pairs from a file: every row is used, left out and counted, or named as a fault.

A line is a JSON object with ``prompt`` and ``response``. Where rows also have ``is_safe``
(BeaverTails), only those that say false are used: the others are the aligned model's own manner.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from enchtable_vllm.errors import TrainingDataError, summarize_faults
from enchtable_vllm.files import parse_json


@dataclass(frozen=True)
class Pair:
    """One training example: a user's question and the assistant's whole answer.

    Attributes:
        line: Where it stands in its file, from 1.
    """

    line: int
    prompt: str
    response: str


@dataclass(frozen=True)
class RowFault:
    """Why a row cannot be used."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class PairFile:
    """What a file holds.

    Attributes:
        name: The file's name, without its folder.
        digest: blake3 of its bytes.
        rows: Its lines.
        pairs: What can be trained on, in the file's order.
        safe: Rows left out because they say ``"is_safe": true``.
        duplicates: Rows left out because an earlier one says the same; only where asked for.
        faults: Rows that cannot be used.
    """

    name: str
    digest: str
    rows: int
    pairs: tuple[Pair, ...]
    safe: int
    duplicates: int
    faults: tuple[RowFault, ...]

    def counts(self) -> dict[str, object]:
        """For people and manifests: where the rows went."""
        return {
            "file": self.name,
            "digest": self.digest,
            "rows": self.rows,
            "usable": len(self.pairs),
            "left_out_safe": self.safe,
            "left_out_duplicates": self.duplicates,
        }


def read_pairs(path: Path, *, drop_duplicates: bool = False) -> PairFile:
    """Read and check a whole file; faults are collected, not raised (see `refuse_faults`).

    Args:
        path: JSON lines, UTF-8; packed, if it ends in ``.gz``.
        drop_duplicates: Leave a repeated row out and count it, instead of calling it a fault.

    Raises:
        TrainingDataError: The file cannot be read.
    """
    try:
        if not path.is_file():  # a FIFO would wait for a writer
            raise FileNotFoundError("no such file" if not path.exists() else "no file, but another")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content: bytes = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingDataError(
            f"training data '{path}'",
            expected="a file that can be read",
            got=error,
            fix="Check the path and its permissions.",
        ) from error
    lines = content.split(b"\n")
    if lines and not lines[-1].strip():
        lines.pop()
    rows: list[tuple[int, dict[str, Any]]] = []
    faults: list[RowFault] = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if isinstance(row, str):
            faults.append(RowFault(number, row))
        else:
            rows.append((number, row))
    labelled = any("is_safe" in row for _, row in rows)
    pairs: list[Pair] = []
    first: dict[tuple[str, str], int] = {}
    safe = duplicates = 0
    for number, row in rows:
        reason = _fault(row, labelled)
        if reason is not None:
            faults.append(RowFault(number, reason))
        elif row.get("is_safe"):
            safe += 1
        elif (key := (row["prompt"], row["response"])) not in first:
            first[key] = number
            pairs.append(Pair(number, *key))
        elif drop_duplicates:
            duplicates += 1
        else:
            faults.append(RowFault(number, f"the same as line {first[key]}"))
    return PairFile(
        path.name,
        f"blake3:{blake3(content).hexdigest()}",
        len(lines),
        tuple(pairs),
        safe,
        duplicates,
        tuple(faults),
    )


def refuse_faults(file: PairFile, faults: Iterable[RowFault] = ()) -> None:
    """Refuse a file if any of its rows is unusable.

    Args:
        file: As read.
        faults: What else was found, such as pairs that are too long.

    Raises:
        TrainingDataError: With every fault in its ``faults``; or nothing is left to train on.
    """
    found = sorted((*file.faults, *faults), key=lambda fault: fault.line)
    if found:
        error = TrainingDataError(
            f"training data '{file.name}'",
            expected="rows that can all be used",
            got=summarize_faults([str(fault) for fault in found]),
            fix="Mend or remove these rows; '--drop-duplicates' leaves repeated ones out, "
            "'--max-length' admits longer ones.",
        )
        error.faults = tuple(map(str, found))
        raise error
    if not file.pairs:
        raise TrainingDataError(
            f"training data '{file.name}'",
            expected="at least one pair to train on",
            got=f"{file.rows} rows, {file.safe} of them safe",
            fix="Give rows with a prompt and a response; of rows with 'is_safe' only those that "
            "say false are used.",
        )


def split(
    pairs: Sequence[Pair], *, count: int, eval_share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Draw (training, held-out) pairs. One prompt is never on both sides.

    Args:
        pairs: All of them.
        count: How many train, if there are enough.
        eval_share: The share of those drawn that is held out; at least one pair if not zero.
        seed: Of the draw.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    prompts = list(by_prompt)
    random.Random(seed).shuffle(prompts)
    drawn = min(len(pairs), round(count / (1 - eval_share)))
    wanted = max(1, round(drawn * eval_share)) if eval_share else 0
    held_out: list[Pair] = []
    training: list[Pair] = []
    for prompt in prompts:
        if len(held_out) < wanted:
            held_out += by_prompt[prompt]
        else:
            training += by_prompt[prompt]
    return training[:count], held_out[:wanted]


def _parse(line: bytes) -> dict[str, Any] | str:
    """A row, or what is wrong with it."""
    if not line.strip():
        return "empty"
    try:
        row = parse_json(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"


def _fault(row: dict[str, Any], labelled: bool) -> str | None:
    for key in ("prompt", "response"):
        if key not in row:
            return f"no '{key}'"
        value = row[key]
        if not isinstance(value, str):
            return f"'{key}' is no text but {type(value).__name__}"
        if not value.strip():
            return f"'{key}' is empty"
    if labelled and "is_safe" not in row:
        return "no 'is_safe', which other rows have"
    if labelled and not isinstance(row["is_safe"], bool):
        return f"'is_safe' is neither true nor false but {row['is_safe']!r}"
    return None
