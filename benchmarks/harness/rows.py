"""Rows of results: what was measured, and what made it."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent.parent / "results"
#: So many values are kept as they are; of more, as many evenly spaced order statistics.
MOST_SAMPLES = 100

#: ``modelled``: derived from rows that were measured.
Basis = Literal["measured", "modelled"]


@dataclass(frozen=True)
class Row:
    """One figure; its fields are the columns of the CSV.

    Attributes:
        op: What was done.
        provider: By whom: us, or a named peer.
        shape: To what.
        dtype: Of the weights.
        metric, unit: What was read off.
        p20, p50, p80, n: The quantiles of n values.
        samples: The values themselves, from which intervals are computed.
        basis: Measured or modelled.
        device, versions, git_sha, utc, command: What made it.
    """

    op: str
    provider: str
    shape: str
    dtype: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    n: int
    samples: tuple[float, ...] = ()
    basis: Basis = "measured"
    device: str = ""
    versions: str = ""
    git_sha: str = ""
    utc: str = ""
    command: str = ""

    @property
    def what(self) -> tuple[str, ...]:
        """What two providers must have in common to be compared."""
        return self.op, self.shape, self.dtype, self.metric, self.unit


FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_NUMBERS = ("p20", "p50", "p80")


def row(
    op: str,
    provider: str,
    shape: object,
    dtype: str,
    values: Sequence[float],
    *,
    metric: str = "time",
    unit: str = "s",
    basis: Basis = "measured",
) -> Row:
    """A row of what was measured; the harness adds what made it."""
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=5, method="inclusive") if len(ordered) > 1 else ordered
    middle = statistics.median(ordered)
    kept = tuple(values)
    if len(kept) > MOST_SAMPLES:
        last = len(ordered) - 1
        kept = tuple(ordered[round(i * last / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES))
    return Row(
        op, provider, str(shape), dtype, metric, unit, cuts[0], middle, cuts[-1], len(ordered),
        kept, basis,
    )  # fmt: skip


def append(rows: Iterable[Row], path: Path) -> None:
    """Add rows to a file of results."""
    append_records(map(_record, rows), FIELDS, path)


def append_records(
    records: Iterable[Mapping[str, object]], fields: Sequence[str], path: Path
) -> None:
    """Add records of other columns than a `Row` has to a file of results."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(records)


def read(path: Path) -> list[Row]:
    """The rows of a file of results, the oldest first; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_row(record) for record in csv.DictReader(file)]


def _record(row: Row) -> dict[str, object]:
    record = dataclasses.asdict(row)
    numbers = {name: f"{record[name]:.6g}" for name in _NUMBERS}
    return {**record, **numbers, "samples": " ".join(f"{value:.6g}" for value in row.samples)}


def _row(record: dict[str, Any]) -> Row:
    numbers: dict[str, Any] = {name: float(record[name] or "nan") for name in _NUMBERS}
    numbers["n"] = int(record["n"])
    numbers["samples"] = tuple(map(float, (record["samples"] or "").split()))
    return Row(**{**record, **numbers})
