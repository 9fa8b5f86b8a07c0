"""What is told of a swap, while it goes on and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Record:
    """What is told of a swap; see ``swaps`` in docs/http-api.md.

    ``pausing_seconds`` is from asking for the pause until no engine computes any more: a step of
    the model where requests are kept, as long as they take where they are waited for.
    ``paused_seconds`` is from then until generation goes on.
    """

    source: str
    target: str
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    outcome: str = "refused"
    phase: str = "stage"
    staging_seconds: float = 0.0
    pausing_seconds: float = 0.0
    paused_seconds: float = 0.0
    swap_seconds: float = 0.0
    staged_bytes: int = 0
    reason: str | None = None
    code: str | None = None

    def to_json(self) -> dict[str, Any]:
        """With the names of the interface."""
        found = dict(vars(self))
        return {"from": found.pop("source"), "to": found.pop("target"), **found}
