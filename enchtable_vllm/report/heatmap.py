"""A heat map of layers and modules, and the table that says the same in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from enchtable_vllm.page import Html, label, table, text
from enchtable_vllm.page.svg import bar, picture, word
from enchtable_vllm.report.cells import Cell, Measure, Spread, by_stack
from enchtable_vllm.report.charts import every, figure, number, span

#: How many colours there are, in report.css.
STEPS = 8
#: More cells than this are not drawn: they would make a page too large to be used.
MOST_CELLS = 2400
_MOST_MODULES = 40
_WIDTH, _ROW, _TOP = 1000, 18, 22
_LETTER = 6.7  # of 12 px text, about
_LONGEST = 34
#: Values within this share of each other are not spread over the whole scale: it would show noise.
_ALIKE = 0.02


@dataclass(frozen=True)
class Grid:
    """What is drawn, and how much is not.

    Attributes:
        layers, modules: The axes: layer numbers, and module names as they are shown.
        cells: Where there is one.
        left_out: How many cells had no room.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: Mapping[tuple[str, int], Cell]
    left_out: int


def layout(found: Sequence[Cell]) -> Grid:
    """Lay out the cells that have a layer; with several stacks of layers, one below the other."""
    stacks = dict(by_stack(found))
    placed = {
        (cell.module if len(stacks) == 1 else f"{stack}: {cell.module}", layer): cell
        for stack, cells in stacks.items()
        for cell in cells
        if (layer := cell.layer) is not None
    }
    modules = tuple(dict.fromkeys(module for module, _ in placed))[:_MOST_MODULES]
    layers = tuple(sorted({layer for _, layer in placed}))[: MOST_CELLS // max(len(modules), 1)]
    drawn = {key: c for key, c in placed.items() if key[0] in modules and key[1] in set(layers)}
    return Grid(layers, modules, drawn, len(placed) - len(drawn))


def heat_map(grid: Grid, measure: Measure, title: str, words: str) -> Html:
    """One measure over the whole grid.

    Args:
        grid: From `layout`.
        measure: Which.
        title: Of the figure.
        words: What is seen in it.
    """
    spreads = {
        key: spread
        for key, cell in grid.cells.items()
        if (spread := getattr(cell, measure)) is not None
    }
    if not spreads:
        return figure(title, words, Html('<p class="note">Not known.</p>'), Html(""))
    low = min(s.median for s in spreads.values())
    high = max(s.median for s in spreads.values())
    top = max(high, low + _ALIKE * abs(low))
    left = 12 + _LETTER * min(_LONGEST, max(map(len, grid.modules)))
    across = min(28.0, (_WIDTH - left) / len(grid.layers))
    parts = _axes(grid, left, across)
    for (module, layer), cell in grid.cells.items():
        row, column = grid.modules.index(module), grid.layers.index(layer)
        spread = spreads.get((module, layer))
        paint = "none" if spread is None else f"q{_step(spread.median, low, top)}"
        says = f"layer {layer}, {module}: {_said(spread, cell.matrices)}"
        where = f' data-row="{row}" data-column="{column}"'
        place = (left + column * across, _TOP + row * _ROW)
        parts.append(bar(*place, max(across - 1, 1), _ROW - 1, paint, says, where))
    bottom = _TOP + len(grid.modules) * _ROW
    parts += _legend(left, bottom + 12, low, high, top)
    width = max(left + across * len(grid.layers), left + 330) + 8
    summary = (
        f"{title}, {len(grid.modules)} modules by {len(grid.layers)} layers, "
        f"{span(low, high)}. The table below has the numbers."
    )
    return figure(
        title, words, picture(width, bottom + 34, summary, parts), _numbers(grid, spreads, title)
    )


def _axes(grid: Grid, left: float, across: float) -> list[str]:
    parts = []
    for row, module in enumerate(grid.modules):
        shown = module if len(module) <= _LONGEST else f"…{module[1 - _LONGEST :]}"
        parts.append(word(left - 6, _TOP + row * _ROW + 13, shown, "end"))
    step = every(across)
    for column, layer in enumerate(grid.layers):
        if column % step == 0:
            parts.append(word(left + (column + 0.5) * across, _TOP - 7, layer, "middle"))
    return parts


def _legend(left: float, y: float, low: float, high: float, top: float) -> list[str]:
    """The steps that occur, and from where to where they go."""
    steps = _step(high, low, top) + 1
    parts = [bar(left + 18 * step, y, 17, 12, f"q{step}") for step in range(steps)]
    words = span(low, high) + (", nearly the same" if top > high else "")
    return [*parts, word(left + 18 * steps + 6, y + 11, words)]


def _step(value: float, low: float, high: float) -> int:
    return 0 if high <= low else min(STEPS - 1, int((value - low) / (high - low) * STEPS))


def _said(spread: Spread | None, matrices: int) -> str:
    if spread is None:
        return "not known"
    words = number(spread.median)
    if matrices > 1:
        words += f" ({number(spread.low)} to {number(spread.high)}, {matrices} matrices)"
    return words


def _numbers(grid: Grid, spreads: Mapping[tuple[str, int], Spread], title: str) -> Html:
    rows: list[list[object]] = []
    for layer in grid.layers:
        line: list[object] = [layer]
        for module in grid.modules:
            spread = spreads.get((module, layer))
            line.append("–" if spread is None else _cell(spread))
        rows.append(line)
    head = ["layer", *(label(module) for module in grid.modules)]
    return table(head, rows, caption=f"{title}, by layer")


def _cell(spread: Spread) -> Html:
    if spread.low == spread.high:
        return text(number(spread.median))
    low, high = number(spread.low), number(spread.high)
    return Html(f"{number(spread.median)} <small>{low}–{high}</small>")
