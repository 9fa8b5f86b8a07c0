"""The tables in README.md and docs/ that are made of rows of results.

A page has ``<!-- bench:NAME -->`` where a table goes and ``<!-- /bench:NAME -->`` after it.
Below each table stands what made it: command, machine, date, commit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness.registry import REGISTRY
from benchmarks.harness.results import NotMeasured, Results
from enchtable_vllm.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
_BLOCK = re.compile(
    r"(?P<begin><!-- bench:(?P<name>[\w-]+) -->\n).*?(?P<end><!-- /bench:(?P=name) -->\n)",
    re.DOTALL,
)


class Made(Protocol):
    """What a figure comes from."""

    @property
    def device(self) -> str:
        """The machine."""

    @property
    def utc(self) -> str:
        """When."""

    @property
    def git_sha(self) -> str:
        """The commit."""

    @property
    def command(self) -> str:
        """What was typed."""


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        head: Its first line.
        lines: The others.
        rows: The rows of results that its figures come from.
        note: What else to know, below it.
    """

    head: Sequence[str]
    lines: Iterable[Sequence[str]]
    rows: Sequence[Made]
    note: str = ""

    def __str__(self) -> str:
        """As Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.lines]
        below = " ".join(filter(None, (made_by(self.rows), self.note)))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{below}\n"


#: What makes each block.
Blocks = Mapping[str, Callable[[Results], object]]


def made_by(rows: Sequence[Made]) -> str:
    """Each run that figures come from: command, machine, date, commit."""
    runs: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        where = row.device, row.utc[:10], row.git_sha
        runs.setdefault(where, {})[f"`{row.command}`"] = None
    return " ".join(
        f"({', '.join(commands)} on {device}, {date}" + (f", at {sha})" if sha else ")")
        for (device, date, sha), commands in runs.items()
    )


def blocks() -> Blocks:
    """Those of every benchmark, and of the pages that derive figures from several."""
    from benchmarks import scale, summary
    from benchmarks.safety_transfer import pages as transfer

    found = {**summary.TABLES, **scale.TABLES, **transfer.TABLES}
    for benchmark in REGISTRY:
        found |= benchmark.shown("TABLES")
        for name, make in benchmark.shown("PLOTS").items():
            found[f"{name}-plot"] = functools.partial(_image, name, make)
    return found


def _image(name: str, make: Callable[[Results], Any], results: Results) -> str:
    """The plot of that name, where there is one to be drawn."""
    return f"![{make(results).title}](images/bench-{name}.svg)\n"


def pages() -> list[Path]:
    """Where blocks may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def stale(
    results: Results | None = None,
    known: Blocks | None = None,
    among: Sequence[Path] | None = None,
) -> Iterator[tuple[Path, str]]:
    """The pages that are not what the newest rows say, and what they should be.

    Raises:
        ConfigError: A page has a block that nothing makes.
    """
    results, known = results or Results(), blocks() if known is None else known
    for page in pages() if among is None else among:
        text = page.read_text()
        made = _BLOCK.sub(functools.partial(_made, page, known, results), text)
        if made != text:
            yield page, made


def _made(page: Path, known: Blocks, results: Results, match: re.Match[str]) -> str:
    if match["name"] not in known:
        raise ConfigError(
            f"{page.name}, block 'bench:{match['name']}'",
            expected=f"one of {', '.join(sorted(known))}",
            got=match["name"],
            fix="A benchmark's TABLES name its blocks.",
        )
    try:
        made = str(known[match["name"]](results))
    except NotMeasured as missing:
        made = f"*Not measured yet: no {missing.expected}.*\n"
    return match["begin"] + made + match["end"]
