"""The tables of README.md and docs/transfer.md: what the newest run found on the test split."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.tables import Table

#: A report's folder → what it is called; ``{}`` is its β. In the order of the table.
MODELS = {
    "aligned": "aligned",
    "task": "fine-tune",
    "merged-published": "merged, β {}, as published",
    "merged": "merged, β {}, tuned within the budget",
    "merged-tenth": "merged, β {}, the smallest that reached a tenth of the unsafe rate "
    "on the validation split",
    "self-reminder": "fine-tune with Self-Reminder",
    "safedecoding": "fine-tune with SafeDecoding",
}
METRICS = {"unsafe": "unsafe", "utility": "word problems", "over_refusal": "over-refusal"}
_MERGED = ("merged-tenth", "merged", "merged-published")


@dataclass(frozen=True)
class Found:
    """One figure of one seed; in the words of `findings`.

    Attributes:
        beta: None without a merge.
        value, low, high: Shares, and a 95% interval; or a p-value, without one.
        n: Of so many.
        device, utc, git_sha, command: What made it.
    """

    model: str
    seed: int
    set: str
    beta: float | None
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    device: str
    utc: str
    git_sha: str
    command: str


def newest(path: Path) -> list[Found]:
    """All of the newest run's figures on the test split.

    Raises:
        NotMeasured: There is no run.
    """
    records: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            records = [record for record in csv.DictReader(file) if record["split"] == "test"]
    if not records:
        raise NotMeasured(
            "results of 'safety_transfer'", expected="rows of 'make bench-transfer'", got="none",
            fix="Run that.",
        )  # fmt: skip
    latest = max(record["utc"] for record in records)
    return [_found(record) for record in records if record["utc"] == latest]


def _found(record: dict[str, Any]) -> Found:
    def number(key: str) -> float | None:
        return float(record[key]) if record[key] else None

    return Found(
        record["model"], int(record["seed"]), record["set"], number("beta"), record["metric"],
        float(record["value"] or "nan"), number("low"), number("high"), int(record["n"] or 0),
        record["device"], record["utc"], record["git_sha"], record["command"],
    )  # fmt: skip


def _of(found: Sequence[Found], model: str, metric: str) -> list[Found]:
    """A figure of every seed: over all sets, where there are several."""
    figures = [one for one in found if (one.model, one.metric) == (model, metric)]
    return [one for one in figures if one.set == "all"] or figures


def _share(figures: Sequence[Found]) -> str:
    """With its interval; of several seeds the mean, with the least and the most."""
    if not figures:
        return ""
    values = [100 * one.value for one in figures]
    shown = f"{sum(values) / len(values):.1f}%"
    if len(values) > 1:
        return f"{shown} ({min(values):.1f}–{max(values):.1f})"
    (one,) = figures
    if one.low is None or one.high is None:
        return shown
    return f"{shown} ({100 * one.low:.1f}–{100 * one.high:.1f})"


def _p(figures: Sequence[Found]) -> str:
    return f", p = {figures[0].value:.2g}" if len(figures) == 1 else ""


def _whole(results: Results) -> Table:
    found = newest(results.folder / "safety_transfer.csv")
    models = [model for model in MODELS if _of(found, model, "unsafe")]
    return Table(["", *_heads(found)], _lines(found, models), found)


def _heads(found: Sequence[Found]) -> Iterator[str]:
    for metric, name in METRICS.items():
        yield f"{name} ({_of(found, 'task', metric)[0].n:,})"


def _lines(found: Sequence[Found], models: Sequence[str]) -> Iterator[list[str]]:
    for model in models:
        betas = {f"{one.beta:g}" for one in found if one.model == model and one.beta is not None}
        cells = (
            _share(_of(found, model, metric)) + _p(_of(found, model, f"{metric}_mcnemar_p"))
            for metric in METRICS
        )
        yield [MODELS[model].format(" or ".join(sorted(betas))), *cells]


def _brief(results: Results) -> Table:
    """The aligned model, the fine-tune, and the merge that reaches the aim for safety."""
    found = newest(results.folder / "safety_transfer.csv")
    merged = next(model for model in _MERGED if _of(found, model, "unsafe"))
    said = {
        "unsafe": "does not refuse AdvBench",
        "utility": "solves word problems",
        "over_refusal": "refuses harmless requests",
    }
    lines = [
        [f"{words} ({_of(found, 'task', metric)[0].n:,})"]
        + [
            f"{_of(found, model, metric)[0].value:.1%}" if len(_of(found, model, metric)) == 1
            else _share(_of(found, model, metric))
            for model in ("aligned", "task", merged)
        ]
        for metric, words in said.items()
    ]  # fmt: skip
    return Table(["", "aligned", "fine-tune", "merged"], lines, found)


TABLES: dict[str, Callable[[Results], Table]] = {"transfer": _whole, "transfer-brief": _brief}
