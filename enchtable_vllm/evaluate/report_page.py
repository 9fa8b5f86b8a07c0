"""``index.html``: one model's report for people."""

from __future__ import annotations

from collections import defaultdict

from enchtable_vllm.evaluate.report import Rate, Report, Result
from enchtable_vllm.page import Html, cell, heading, page, paragraph, table

WHAT = {
    "safety": "unsafe",
    "harmless": "refused (over-refusal)",
    "jailbreak": "unsafe under templates",
    "utility": "correct",
}


def report_page(report: Report) -> str:
    """The page's text."""
    parts = [_about(report), paragraph(f"Refusal patterns: {report.judge.calibrated}.", "note")]
    if report.judge.name == "patterns" and report.kind("safety"):
        parts.append(
            paragraph(
                "Unsafe here means: not recognised as a refusal. The patterns cannot tell a "
                "harmful answer from a harmless or a senseless one.",
                "warning",
            )
        )
    parts.append(
        table(
            ("set", "rate, 95% interval", "refused", "if all doubts were unsafe", "not judged"),
            [_line(result, report.judge.calibrated) for result in report.results],
        )
    )
    for result in report.results:
        parts += _categories(result)
        if result.bad:
            parts.append(paragraph(f"{result.name}: {len(result.bad)} bad entries:", "warning"))
            parts += [paragraph(fault, "warning") for fault in result.bad]
    if report.dynamic is not None:
        parts += _dynamic(report)
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts.append(paragraph(f"Made {report.created} with {versions}.", "note"))
    return page(f"Evaluation of {report.model}", parts)


def _about(report: Report) -> Html:
    served, settings = report.served, report.settings
    vector = "not said by the server"
    if served is not None:
        vector = f"{served.safety_vector}, beta {served.beta}, version {served.weight_version}"
    sample = "all prompts" if settings.limit is None else f"at most {settings.limit} of each set"
    rows: list[tuple[str, object]] = [
        ("model", report.model),
        ("safety vector", vector),
        ("judge", report.judge.name + (f": {report.judge.model}" if report.judge.model else "")),
        ("baseline", report.baseline or "none"),
        ("asked", f"greedy, {settings.max_tokens} tokens; {sample}; split {settings.split}, "
         f"seed {settings.seed}"),
    ]  # fmt: skip
    return table(("", ""), rows)


def _line(result: Result, calibrated: str) -> list[object]:
    named = cell(f"{result.name}: {WHAT[result.kind]}", f"{result.source}, {result.digest[:19]}")
    doubts = f"{result.unparseable} unparseable, {result.failed} failed"
    beside = "" if result.kind == "utility" else calibrated
    return [named, _rate(result.main, beside), _rate(result.refused), _rate(result.worst), doubts]


def _rate(rate: Rate | None, beside: str = "") -> Html:
    if rate is None or rate.share is None:
        return cell("–")
    small = f"[{rate.low:.1%}, {rate.high:.1%}] {rate.count}/{rate.of}"
    return cell(f"{rate.share:.1%}", small + (f"; {beside}" if beside else ""))


def _categories(result: Result) -> list[Html]:
    flags: dict[str, list[bool]] = defaultdict(list)
    event = {"utility": "correct"}.get(result.kind, "unsafe")
    for sample in result.samples:
        if result.kind == "harmless" and sample.verdict != "failed":
            flags[sample.category].append(bool(sample.refused))
        elif sample.verdict not in ("failed", "unparseable") or (
            result.kind == "utility" and sample.verdict != "failed"
        ):
            flags[sample.category].append(sample.verdict == event)
    if len(flags) < 2:
        return []
    rows = [(name or "none", _rate(Rate.of_flags(found))) for name, found in flags.items()]
    head = ("category", f"{WHAT[result.kind]}, 95% interval")
    return [heading(f"{result.name} by category"), table(head, rows)]


def _dynamic(report: Report) -> list[Html]:
    found = report.dynamic
    assert found is not None
    rows = [(f"{probe.probe}, {probe.detector}", _rate(probe.broke)) for probe in found.probes]
    parts = [heading(f"Attacks by garak {found.version}")]
    if not found.complete:
        parts.append(paragraph("Garak's report does not say that it came to its end.", "warning"))
    if found.unjudged:
        parts.append(paragraph(f"{found.unjudged} answers have no score.", "warning"))
    return [*parts, table(("probe, detector", "attack succeeded, 95% interval"), rows)]
