"""Distributions and norms as small pictures, each with its numbers in a table behind it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from enchtable_vllm.page import Html, label, table, text
from enchtable_vllm.page.svg import bar, line, picture, word

_BINS = 24
_WIDTH, _HEIGHT, _LEFT, _TOP = 360, 170, 44, 10
#: Above the bars, for what is said of the median.
_HEAD = 18
_ROW = 20
_LONGEST = 30
#: So many layers are drawn at most.
_MOST_COLUMNS = 128


def number(value: float) -> str:
    """Three significant digits, or four places where that says as much."""
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def span(low: float, high: float) -> str:
    """From where to where, in as many digits as it takes to tell the two apart."""
    ends = number(low), number(high)
    for digits in range(4, 10):
        if ends[0] != ends[1] or low == high:
            break
        ends = f"{low:.{digits}g}", f"{high:.{digits}g}"
    return " to ".join(ends)


def every(across: float) -> int:
    """Which columns of this width get a number below them: every one, second, fifth, and so on."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * across >= 24), 100)


def figure(title: str, words: str, drawn: Html, numbers: Html) -> Html:
    """A picture under its title, and its numbers, folded away."""
    about = f"<p>{text(words)}</p>" if words else ""
    folded = (
        f"<details><summary>The numbers of: {text(title)}</summary>{numbers}</details>"
        if numbers
        else ""
    )
    return Html(
        f"<figure><figcaption><h3>{text(title)}</h3>{about}</figcaption>{drawn}{folded}</figure>"
    )


def histogram(values: Sequence[float], title: str, words: str, unit: str, units: str) -> Html:
    """How often which value occurs.

    Args:
        values: At least one.
        title: Of the figure.
        words: What is seen in it, if the title does not say.
        unit: What is counted: ``matrix``.
        units: Several of it.
    """
    low, high = min(values), max(values)
    width = (high - low) / _BINS
    counts = [0] * (_BINS if width > 0 else 1)
    for value in values:
        counts[min(len(counts) - 1, int((value - low) / width)) if width > 0 else 0] += 1
    most = max(counts)
    first, _, last = span(low, high).partition(" to ")
    inner, floor = _WIDTH - _LEFT - 12, _HEIGHT - 26
    top = _TOP + _HEAD
    parts = [
        line(_LEFT, floor, _WIDTH - 12, floor, "currentColor", 1),
        word(_LEFT - 6, top + 10, most, "end"),
        word(_LEFT - 6, floor, 0, "end"),
        word(_LEFT, _HEIGHT - 8, first),
        word(_WIDTH - 12, _HEIGHT - 8, last, "end"),
    ]
    rows: list[tuple[object, ...]] = []
    for place, count in enumerate(counts):
        start, end = low + place * width, low + (place + 1) * width
        tall = count / most * (floor - top)
        across = inner / len(counts)
        bounds = span(start, end)
        if count:
            at = (_LEFT + place * across, floor - tall)
            said = f"{bounds}: {count} {unit if count == 1 else units}"
            parts.append(bar(*at, max(across - 1, 1), tall, "mark", said))
            rows.append((bounds, count))
    middle = statistics.median(values)
    if width > 0:
        x = _LEFT + (middle - low) / (high - low) * inner
        parts.append(line(x, _TOP + 14, x, floor, "currentColor", 1.5))
        anchor = "end" if x > _LEFT + inner / 2 else "start"
        parts.append(word(x, _TOP + 10, f"median {number(middle)}", anchor))
    of = unit if len(values) == 1 else units
    summary = f"{title}: {len(values)} {of} from {span(low, high)}, median {number(middle)}"
    drawn = picture(_WIDTH, _HEIGHT, summary, parts)
    return figure(title, words, drawn, table((title, units), rows, caption=summary))


def ranges(groups: Sequence[tuple[str, Sequence[float]]], title: str, words: str) -> Html:
    """Of each group least to greatest, the middle half, and the median, on one axis."""
    low = min(min(values) for _, values in groups)
    high = max(max(values) for _, values in groups)
    left = 12 + 6.7 * min(_LONGEST, max(len(name) for name, _ in groups))
    right = left + 380

    def at(value: float) -> float:
        share = 0.5 if high == low else (value - low) / (high - low)
        return left + share * (right - left)

    parts, rows = [], []
    for place, (name, values) in enumerate(groups):
        y = _TOP + place * _ROW + _ROW / 2
        quarter, middle, three = _quartiles(values)
        shown = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
        parts.append(word(left - 8, y + 4, shown, "end"))
        parts.append(line(at(min(values)), y, at(max(values)), y, "currentColor", 1))
        says = f"{name}: median {number(middle)}, {number(min(values))} to {number(max(values))}"
        box = max(at(three) - at(quarter), 3.0)
        parts.append(bar(at(quarter), y - 5, box, 10, "mark", says))
        parts.append(line(at(middle), y - 7, at(middle), y + 7, "currentColor", 2))
        numbers = (min(values), quarter, middle, three, max(values))
        rows.append((label(name), len(values), *map(number, numbers)))
    bottom = _TOP + len(groups) * _ROW
    first, _, last = span(low, high).partition(" to ")
    parts.append(word(left, bottom + 16, first))
    parts.append(word(right, bottom + 16, last, "end"))
    summary = f"{title}: {len(groups)} modules between {number(low)} and {number(high)}"
    head = ("module", "matrices", "least", "a quarter below", "median", "a quarter above", "most")
    drawn = picture(right + 12, bottom + 24, summary, parts)
    return figure(title, words, drawn, table(head, rows, caption=title, kind="sortable"))


def columns(values: Sequence[tuple[int, float, float]], title: str, words: str) -> Html:
    """The norm of the planned change, layer by layer.

    Args:
        values: Layer, ‖S‖, ‖c · S‖; in order.
        title: Of the figure.
        words: What is seen in it.
    """
    shown = values[:_MOST_COLUMNS]
    if len(values) > len(shown):
        words += f" The first {len(shown)} of {len(values):,} are shown."
    most = max(change for *_, change in shown) or 1.0
    inner, floor = 640, _HEIGHT - 26
    across = min(28.0, inner / len(shown))
    step = every(across)
    parts = [
        line(_LEFT, floor, _LEFT + across * len(shown), floor, "currentColor", 1),
        word(_LEFT - 6, _TOP + 10, number(most), "end"),
        word(_LEFT - 6, floor, 0, "end"),
    ]
    for place, (layer, _, change) in enumerate(shown):
        tall = change / most * (floor - _TOP)
        x = _LEFT + place * across
        says = f"layer {layer}: {number(change)}"
        parts.append(bar(x, floor - tall, max(across - 1, 1), tall, "mark", says))
        if place % step == 0:
            parts.append(word(x + across / 2, _HEIGHT - 8, layer, "middle"))
    summary = f"{title}: {len(shown)} layers, at most {number(most)}"
    rows = [(layer, number(safety), number(change)) for layer, safety, change in shown]
    drawn = picture(_LEFT + across * len(shown) + 12, _HEIGHT, summary, parts)
    head = ("layer", "‖S‖", "‖c · S‖")
    return figure(title, words, drawn, table(head, rows, caption=title, kind="sortable"))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third
