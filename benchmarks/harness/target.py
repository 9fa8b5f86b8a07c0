"""What is promised of a figure: pages say it beside the figure, whether it was kept or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A bound, and what became of it.

    Attributes:
        promised: The bound, in short.
        kept: Whether the figure is within it; None: there are too few to tell.
        found: The figure, and what else a reader should know where it is not.
    """

    promised: str
    kept: bool | None
    found: str

    def __str__(self) -> str:
        """For tables."""
        outcome = {True: "", False: ": **missed**", None: ": undecided"}[self.kept]
        return f"{self.promised}{outcome}"

    @property
    def missed(self) -> str:
        """In words."""
        return f"{self.found}: promised {self.promised}"


def cell(targets: Iterable[Target]) -> str:
    """Of a table; empty where nothing is promised."""
    return "; ".join(map(str, targets))


def tally(targets: Sequence[Target]) -> str:
    """For the note below a table."""
    kept = [target.kept for target in targets]
    words = [f"Targets missed: {kept.count(False)} of {len(kept)}."] if kept else []
    return " ".join(words + [f"Undecided: {kept.count(None)}."] * (None in kept))
