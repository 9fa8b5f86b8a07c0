"""The few marks that pictures are made of: drawn here, so that a page needs no script for them."""

from __future__ import annotations

from collections.abc import Iterable

from enchtable_vllm.page.document import Html, text


def picture(width: float, height: float, label: str, parts: Iterable[str]) -> Html:
    """A picture at its own size, in a frame that scrolls where it is wider than the page.

    Args:
        width: In CSS pixels.
        height: Likewise.
        label: What it shows, for whoever does not see it.
        parts: Its marks.
    """
    return Html(
        f'<div class="scroll"><svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{text(label)}" font-size="12">'
        f"{''.join(parts)}</svg></div>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    """A line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def word(
    x: float, y: float, words: object, anchor: str = "start", colour: str = "currentColor"
) -> str:
    """A text; ``anchor`` is which end of it lies at x."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{text(words)}</text>'


def bar(
    x: float, y: float, width: float, height: float, kind: str, title: str = "", more: str = ""
) -> str:
    """A rectangle, painted by its class; with a title, one that says what it is when pointed at."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    says = f"<title>{text(title)}</title>" if title else ""
    return f'<rect {place} class="{kind}"{more}>{says}</rect>'
