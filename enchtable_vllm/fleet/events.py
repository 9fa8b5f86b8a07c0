"""What a roll-out says while it goes: one event each, and one code at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

EventKind: TypeAlias = Literal[
    "began",
    "resumed",
    "verified",
    "refused",
    "step",
    "swapping",
    "swapped",
    "failed",
    "waiting",
    "checking",
    "checked",
    "interrupted",
    "rolling_back",
    "rolled_back",
    "not_rolled_back",
    "warning",
    "ended",
]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


class Outcome(StrEnum):
    """Where the fleet stands when a roll-out ends."""

    DONE = "done"
    REFUSED = "refused"
    ROLLED_BACK = "rolled_back"
    MIXED = "mixed"
    KEPT = "kept"


_CODES = {Outcome.DONE: 0, Outcome.REFUSED: 1, Outcome.ROLLED_BACK: 3, Outcome.MIXED: 4}


def exit_code(outcome: Outcome, signal_number: int | None = None) -> int:
    """Of the process: where the fleet stands, or which signal decided where it does.

    Args:
        outcome: The former.
        signal_number: Of the signal that stopped it. It does not hide that a way back failed.
    """
    if signal_number is not None and outcome not in (Outcome.DONE, Outcome.MIXED):
        return 128 + signal_number
    return _CODES[outcome]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: What.
        facts: Its keys, as `docs/fleet.md` lists them.
        time: When, in UTC.
    """

    kind: EventKind
    facts: dict[str, object]
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> dict[str, object]:
        """A line for machines."""
        when = self.time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"event": self.kind, "time": when, **self.facts}


#: Called with each event, in order.
Listener = Callable[[Event], None]
