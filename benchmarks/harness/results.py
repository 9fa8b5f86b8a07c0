"""Reading results back: which rows are published, and which a user means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.rows import RESULTS, Row, read
from enchtable_vllm.errors import ConfigError, EnchTableError


class NotMeasured(EnchTableError):
    """Pages want a figure that nobody has measured."""


def standard_commands(name: str) -> tuple[str, str]:
    """Those whose rows are published: with options of the user's own, rows are nobody's else."""
    return f"python -m benchmarks run {name}", f"python -m benchmarks run {name} --full"


@dataclass(frozen=True)
class Results:
    """The files of results in a folder."""

    folder: Path = RESULTS

    def published(self, name: str) -> list[Row]:
        """Of the newest run of each standard command; of two for the same thing, the newer.

        Runs on another machine, or of other code, than the newest are left out: a ratio of their
        rows would be one of machines.

        Raises:
            NotMeasured: There is none.
        """
        rows = self.of(name)
        found: dict[tuple[str, ...], Row] = {}
        runs = [newest([r for r in rows if r.command == c]) for c in standard_commands(name)]
        ordered = sorted(filter(None, runs), key=lambda run: run[0].utc)
        for run in ordered:
            if _made_by(run) == _made_by(ordered[-1]):
                found |= {(row.provider, *row.what): row for row in run}
        if not found:
            raise NotMeasured(
                f"results of '{name}'",
                expected=f"rows of '{standard_commands(name)[0]}'",
                got="none",
                fix="Run that.",
            )
        return list(found.values())

    def of(self, name: str) -> list[Row]:
        """All rows of a benchmark, the oldest first."""
        return read(self.folder / f"{name}.csv")


def _made_by(run: Sequence[Row]) -> tuple[str, ...]:
    return run[0].device, run[0].versions, run[0].git_sha


def newest(rows: Sequence[Row]) -> list[Row]:
    """Those of the newest run."""
    latest = max((row.utc for row in rows), default="")
    return [row for row in rows if row.utc == latest]


def chosen(rows: Sequence[Row], which: str | None) -> list[Row]:
    """The rows that a user means.

    Args:
        rows: Of the benchmark.
        which: The beginning of a commit or of a time, of which the newest run is meant; a file of
            results, of which likewise; None: the newest of all.

    Raises:
        ConfigError: There are none.
    """
    if which is None:
        found = newest(rows)
    elif Path(which).is_file():
        found = newest(read(Path(which)))
    else:
        found = newest([r for r in rows if r.git_sha.startswith(which) or r.utc.startswith(which)])
    if not found:
        known = sorted({row.git_sha for row in rows})
        raise ConfigError(
            "results",
            expected=f"a file, or a commit or time of which there are rows: {', '.join(known)}",
            got=which or "none",
            fix="'python -m benchmarks run NAME' makes rows.",
        )
    return found
