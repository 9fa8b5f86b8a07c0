"""One result of one check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from enchtable_vllm.errors import EnchTableError

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        name: What was checked.
        status: ``ok``; ``warn``: works, but should be known; ``fail``: does not work; ``skip``:
            could not be checked.
        found: What is there.
        cause: The root cause, where something is wrong.
        cure: What to do about it.
    """

    name: str
    status: Status
    found: str
    cause: str = ""
    cure: str = ""

    @classmethod
    def refused(cls, name: str, error: EnchTableError) -> Finding:
        """A refusal of the library's own, taken apart."""
        cause = f"{type(error).__name__}: expected {error.expected}, got {error.got}"
        return cls(name, "fail", error.subject, cause, error.fix)

    def to_json(self) -> dict[str, str]:
        """For machines."""
        return asdict(self)
