"""The page of models side by side."""

from __future__ import annotations

from enchtable_vllm.evaluate.compare import KINDS, Comparison, Difference, Doubts, Row
from enchtable_vllm.evaluate.report import Kind, Rate
from enchtable_vllm.page import Html, cell, heading, page, paragraph, table


def compare_page(comparison: Comparison) -> str:
    """The page's text."""
    kinds = [kind for kind in KINDS if any(kind in row.rates for row in comparison.rows)]
    garak = any(row.garak for row in comparison.rows)
    head = ["model", *(KINDS[kind][0] for kind in kinds), *(["garak"] if garak else [])]
    lines: list[list[object]] = []
    for row in comparison.rows:
        line: list[object] = [cell(row.label, about(row))]
        line += [_rate(row.rates.get(kind), row.doubts.get(kind)) for kind in kinds]
        lines.append([*line, _rate(row.garak)] if garak else line)
    parts = [table(head, lines)]
    parts += [paragraph(warning, "warning") for warning in comparison.warnings]
    first = comparison.rows[0].label
    parts.append(heading(f"Differences from {first}, on the same prompts"))
    parts.append(
        table(
            ("model", *(KINDS[kind][0] for kind in kinds)),
            [
                [row.label, *(_difference(row.differences.get(kind), kind) for kind in kinds)]
                for row in comparison.rows[1:]
            ],
        )
    )
    parts.append(
        paragraph(
            "Shares with Wilson's 95% interval. Differences with Bonett and Price's for pairs, and "
            "McNemar's exact two-sided p, not corrected for the number of comparisons.",
            "note",
        )
    )
    return page("Models side by side", parts)


def about(row: Row) -> str:
    """What a row's model is, in a line."""
    words = [row.model]
    if row.safety_vector is not None:
        words.append(f"{row.safety_vector}, beta {row.beta}")
    if row.baseline is not None:
        words.append(row.baseline)
    words += [f"judge {row.judge}, {row.calibrated}"]
    return "; ".join(words)


def doubtful(doubts: Doubts | None) -> str:
    """What a rate leaves open, in words; empty where that is nothing."""
    if doubts is None:
        return ""
    words = f"{doubts.unparseable} unparseable, {doubts.failed} failed"
    if doubts.worst is not None and doubts.worst.share is not None:
        words += f", {doubts.worst.share:.1%} if all were unsafe"
    return words


def sign(difference: Difference, kind: Kind) -> str:
    """Whether a difference is good, bad, or neither as far as 5% can tell."""
    if difference.p >= 0.05 or not difference.difference:
        return "no significant difference"
    return "better" if (difference.difference < 0) == KINDS[kind][1] else "worse"


def _rate(rate: Rate | None, doubts: Doubts | None = None) -> Html:
    if rate is None or rate.share is None:
        return cell("–", doubtful(doubts))
    counts = f"[{rate.low:.1%}, {rate.high:.1%}] {rate.count}/{rate.of}"
    return cell(f"{rate.share:.1%}", "; ".join(filter(None, (counts, doubtful(doubts)))))


def _difference(found: Difference | None, kind: Kind) -> Html:
    if found is None or found.difference is None:
        return cell("–")
    small = (
        f"[{found.low:+.1%}, {found.high:+.1%}], p = {found.p:.3g}, {found.pairs} pairs; "
        f"{sign(found, kind)}"
    )
    return cell(f"{found.difference:+.1%}", small)
