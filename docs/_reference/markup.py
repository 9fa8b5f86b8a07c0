"""Small pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |\n"
        for line in lines
    )


def code(text: object) -> str:
    """As code."""
    return f"`{text}`"


def of_docstring(text: str) -> str:
    """A docstring's words: its double backquotes are Markdown's single ones."""
    return text.replace("``", "`").strip()
