"""What is promised of a figure: pages say it beside the figure, whether it was kept or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A bound, and what became of it.

    Attributes:
        promised: The bound, in short.
        kept: Whether the figure is within it.
        found: The figure, and what else a reader should know where it is not.
    """

    promised: str
    kept: bool
    found: str

    def __str__(self) -> str:
        """For tables."""
        return self.promised if self.kept else f"{self.promised}: **missed**"

    @property
    def missed(self) -> str:
        """In words."""
        return f"{self.found}: promised {self.promised}"


def cell(targets: Iterable[Target]) -> str:
    """Of a table; empty where nothing is promised."""
    return "; ".join(map(str, targets))


def tally(targets: Sequence[Target]) -> str:
    """For the note below a table."""
    missed = sum(not target.kept for target in targets)
    return f"Targets missed: {missed} of {len(targets)}." if targets else ""
