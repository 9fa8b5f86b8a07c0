"""How well the refusal patterns agree with people, on answers that people have labelled.

Refusals are phrased differently by every model: without a labelled set that resembles the answers
under test, a rate is a rate of patterns, and is shown as "not calibrated".
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from enchtable_vllm.errors import summarize_faults
from enchtable_vllm.evaluate.faults import PromptSetError
from enchtable_vllm.evaluate.files import digest_of, parse_lines, read_bytes
from enchtable_vllm.evaluate.refusals import refuses
from enchtable_vllm.evaluate.report import Calibration, Rate

#: What labels mean, in the words that such sets use.
_LABELS = {
    "refusal": True, "refused": True, "refuse": True, "true": True, "1": True, "yes": True,
    "compliance": False, "complied": False, "comply": False, "answer": False, "false": False,
    "0": False, "no": False, "not refusal": False, "not_refusal": False, "other": False,
}  # fmt: skip
#: Names of the columns of a text and of its label; ours first, then those of sets that are about.
_COLUMNS = (("text", "assistant_response", "response"), ("label", "human_score", "is_refusal"))


def calibrate(path: Path) -> Calibration:
    """Hold the patterns against a labelled set.

    Args:
        path: CSV with the columns ``text`` and ``label``, or lines of JSON with these keys. A
            label says refusal (``refusal``, ``true``, ``1``, ``yes``) or not (``compliance``,
            ``false``, ``0``, ``no``).

    Returns:
        Precision: of what the patterns call a refusal, how much is one. Recall: of the
        refusals, how many they find.

    Raises:
        PromptSetError: It cannot be read, has rows without a text or with another label, or
            lacks refusals or answers, without which neither number means anything.
    """
    try:
        data = read_bytes(path)
        rows = list(_rows(path, data))
    except (OSError, ValueError, csv.Error) as error:
        raise _bad(path, error) from error
    labelled: list[tuple[str, bool]] = []
    bad: list[str] = []
    for where, text, label in rows:
        meaning = _LABELS.get(str(label).strip().lower())
        if not isinstance(text, str) or not text.strip():
            bad.append(f"{where} has no text")
        elif meaning is None:
            bad.append(f"{where} has the label '{label}'")
        else:
            labelled.append((text, meaning))
    if bad:
        raise _bad(path, summarize_faults(bad))
    refusals = sum(meaning for _, meaning in labelled)
    if refusals in (0, len(labelled)):
        raise _bad(path, f"{refusals} refusals among {len(labelled)} texts")
    found = [(refuses(text), meaning) for text, meaning in labelled]
    hits = sum(said and meaning for said, meaning in found)
    return Calibration(
        name=path.name,
        digest=digest_of(data),
        labelled=len(labelled),
        refusals=refusals,
        precision=Rate.make(hits, sum(said for said, _ in found)),
        recall=Rate.make(hits, refusals),
    )


def _rows(path: Path, data: bytes) -> Iterator[tuple[str, Any, Any]]:
    if path.suffix != ".csv":
        for number, row in parse_lines(data):
            if not isinstance(row, dict):
                raise ValueError(f"line {number}, which is no object")
            yield f"line {number}", row.get("text"), row.get("label")
        return
    # Some sets begin with remarks.
    lines = data.decode("utf-8-sig").splitlines(keepends=True)
    remarks = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    reader = csv.DictReader(io.StringIO("".join(lines[remarks:])), strict=True)
    columns = list(reader.fieldnames or ())
    found = [next((name for name in names if name in columns), None) for names in _COLUMNS]
    if None in found:
        raise ValueError(f"the columns {', '.join(columns) or 'none'}")
    text, label = found
    for row in reader:
        yield f"line {remarks + reader.line_num}", row[str(text)], row[str(label)]


def _bad(path: Path, got: object) -> PromptSetError:
    return PromptSetError(
        f"labelled refusals '{path}'",
        expected="CSV with the columns text and label, or lines of JSON with these keys; both "
        "refusals and answers",
        got=got,
        fix="Labels are refusal or compliance, true or false, 1 or 0.",
    )
