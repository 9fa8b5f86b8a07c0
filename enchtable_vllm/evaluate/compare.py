"""Models side by side: their rates, and whether they differ on the same prompts.

The first report is what the others are compared with. Prompts are paired by set and digest, so
what only one of two models was asked, or answered, does not count, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from enchtable_vllm.evaluate.faults import ReportError
from enchtable_vllm.evaluate.report import Dynamic, Kind, Rate, Report, Result, Sample
from enchtable_vllm.evaluate.statistics import mcnemar, paired_interval

#: What is compared, in order; the event that is counted; whether less of it is better.
KINDS: dict[Kind, tuple[str, bool]] = {
    "safety": ("unsafe rate", True),
    "utility": ("utility", False),
    "harmless": ("over-refusal", True),
    "jailbreak": ("unsafe under templates", True),
}
_SETTINGS = ("max_tokens", "utility_max_tokens", "utility_prompt")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Difference(_Part):
    """Of the event's share, this model's less the first one's.

    Attributes:
        pairs: Prompts that both have a verdict on.
        unpaired: Of either, those without a partner.
        only_first: Pairs in which it happened to the first model alone.
        only_this: In which it happened to this model alone.
        difference: None without pairs.
        low, high: Its 95% interval; see `paired_interval`.
        p: McNemar's, exact; not corrected for how many comparisons there are.
    """

    pairs: int
    unpaired: int
    only_first: int
    only_this: int
    difference: float | None
    low: float
    high: float
    p: float


class Doubts(_Part):
    """What a model's rate of one kind leaves open.

    Attributes:
        unparseable: Verdicts that say nothing; of utility, answers, which count as wrong.
        failed: Prompts without an answer.
        worst: The rate if all of these were unsafe; None where that makes no sense.
    """

    unparseable: int
    failed: int
    worst: Rate | None


class Row(_Part):
    """One model; ``doubts`` has those kinds of which there are any."""

    label: str
    model: str
    safety_vector: str | None
    beta: float | None
    baseline: str | None
    judge: str
    calibrated: str
    rates: dict[Kind, Rate]
    differences: dict[Kind, Difference]
    doubts: dict[Kind, Doubts]
    garak: Rate | None


class Comparison(_Part):
    """All of them, and what makes the comparison less than fair."""

    format_version: Literal[1] = 1
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


def compare(reports: Sequence[tuple[str, Report]]) -> Comparison:
    """Put reports side by side.

    Args:
        reports: Each with its label; the first is what the others are held against.

    Raises:
        ReportError: There are fewer than two, or two have one label.
    """
    labels = [label for label, _ in reports]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ReportError(
            "reports",
            expected="two or more different ones",
            got=", ".join(labels),
            fix="Name the folders that 'enchtable eval -o' wrote.",
        )
    (first_label, first), *others = reports
    rows = [_row(first_label, first, None)]
    warnings: list[str] = []
    for label, other in others:
        rows.append(_row(label, other, first))
        warnings += [f"{label}: {text}" for text in _unfair(first, other)]
    warnings += [
        f"{row.label}, {KINDS[kind][0]}: {difference.unpaired} prompt(s) have no partner"
        for row in rows
        for kind, difference in row.differences.items()
        if difference.unpaired
    ]
    return Comparison(rows=tuple(rows), warnings=tuple(warnings))


def _row(label: str, report: Report, first: Report | None) -> Row:
    rates = {kind: rate for kind in KINDS if (rate := report.pooled(kind)) is not None}
    differences = {}
    if first is not None:
        differences = {
            kind: _difference(first.kind(kind), report.kind(kind), kind)
            for kind in rates
            if first.kind(kind)
        }
    return Row(
        label=label,
        model=report.model,
        safety_vector=report.served.safety_vector if report.served else None,
        beta=report.served.beta if report.served else None,
        baseline=report.baseline,
        judge=report.judge.name + (f" ({report.judge.model})" if report.judge.model else ""),
        calibrated=report.judge.calibrated,
        rates=rates,
        differences=differences,
        doubts={kind: found for kind in rates if (found := _doubts(report, kind)) is not None},
        garak=report.dynamic.broke if report.dynamic else None,
    )


def _doubts(report: Report, kind: Kind) -> Doubts | None:
    unparseable = sum(result.unparseable for result in report.kind(kind))
    failed = sum(result.failed for result in report.kind(kind))
    if not unparseable and not failed:
        return None
    return Doubts(unparseable=unparseable, failed=failed, worst=report.worst(kind))


def _difference(first: Sequence[Result], this: Sequence[Result], kind: Kind) -> Difference:
    ours, theirs = _events(this, kind), _events(first, kind)
    both = ours.keys() & theirs.keys()
    only_first = sum(theirs[key] and not ours[key] for key in both)
    only_this = sum(ours[key] and not theirs[key] for key in both)
    low, high = paired_interval(only_first, only_this, len(both))
    return Difference(
        pairs=len(both),
        unpaired=len(ours.keys() ^ theirs.keys()),
        only_first=only_first,
        only_this=only_this,
        difference=(only_this - only_first) / len(both) if both else None,
        low=low,
        high=high,
        p=mcnemar(only_first, only_this),
    )


def _events(results: Sequence[Result], kind: Kind) -> dict[tuple[str, str], bool]:
    """By set and prompt, whether a kind's event happened; those without a verdict are left out."""
    found = {}
    for result in results:
        for sample in result.samples:
            if (event := _event(sample, kind)) is not None:
                found[result.digest, sample.id] = event
    return found


def _event(sample: Sample, kind: Kind) -> bool | None:
    if sample.verdict == "failed":
        return None
    if kind == "utility":
        return sample.verdict == "correct"
    if kind == "harmless":
        return bool(sample.refused)
    return None if sample.verdict == "unparseable" else sample.verdict == "unsafe"


def _attacks(dynamic: Dynamic) -> tuple[str, frozenset[tuple[str, str]]]:
    return dynamic.version, frozenset((one.probe, one.detector) for one in dynamic.probes)


def _unfair(first: Report, other: Report) -> list[str]:
    """What differs besides the model."""
    found = []
    mine, theirs = other.judge, first.judge
    if (mine.name, mine.model, mine.template) != (theirs.name, theirs.model, theirs.template):
        found.append("another judge than the first report's")
    for name in _SETTINGS:
        if getattr(other.settings, name) != getattr(first.settings, name):
            found.append(f"another {name} than the first report's")
    if other.dynamic and first.dynamic and _attacks(other.dynamic) != _attacks(first.dynamic):
        found.append("other attacks, or another garak, than the first report's")
    for kind, (what, _) in KINDS.items():
        sets = {result.digest for result in other.kind(kind)}
        if sets != {result.digest for result in first.kind(kind)}:
            found.append(f"{what} is over other sets than the first report's")
    return found
