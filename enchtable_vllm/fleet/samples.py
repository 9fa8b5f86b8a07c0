"""This project's own samples out of a server's ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_VALUE = r'"((?:[^"\\\n]|\\.)*)"'
_LABEL = re.compile(rf"(\w+)={_VALUE}")
_SAMPLE = re.compile(
    rf"^(enchtable_\w+)(?:\{{((?:\w+={_VALUE},?)*)\}})?[ \t]+([^\s]+)", re.MULTILINE
)
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Sample:
    """One line.

    Attributes:
        name: ``enchtable_...``; of a histogram with its ``_bucket``, ``_sum`` or ``_count``.
        labels: As they were before they were escaped.
        value: NaN where there is no such number.
    """

    name: str
    labels: Mapping[str, str]
    value: float


def read_samples(text: str) -> list[Sample]:
    """Every sample whose name begins with ``enchtable_``; lines that are none are passed over."""
    found = []
    for name, labels, _, value in _SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        pairs = {key: _ESCAPED.sub(_unescape, raw) for key, raw in _LABEL.findall(labels)}
        found.append(Sample(name, pairs, number))
    return found


def _unescape(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]
