"""In which order, how many at once, and how long between: all without a server."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypeVar

from enchtable_vllm.errors import ConfigError

_T = TypeVar("_T")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


def plan_steps(targets: Sequence[_T], *, canaries: int, at_once: int) -> list[list[_T]]:
    """Canaries first, then the rest; never more than ``at_once`` in one step.

    Args:
        targets: In the order that they were given.
        canaries: How many of them come before all others.
        at_once: How many may be changed at the same time.
    """
    return [
        list(group[start : start + at_once])
        for group in (targets[:canaries], targets[canaries:])
        for start in range(0, len(group), at_once)
    ]


def parse_duration(text: str) -> float:
    """Seconds: ``90``, ``60s``, ``2m``, ``1h30m``, ``500ms``.

    Raises:
        ConfigError: It is not written so.
    """
    stripped = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", stripped):
        seconds = float(stripped)
    elif stripped and not _PART.sub("", stripped):
        seconds = math.fsum(float(n) * _SECONDS[unit] for n, unit in _PART.findall(stripped))
    else:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ConfigError(
            "a duration",
            expected="a number with ms, s, m or h, such as 60s or 1h30m",
            got=f"'{text}'",
            fix="Without a unit it is seconds.",
        )
    return seconds
