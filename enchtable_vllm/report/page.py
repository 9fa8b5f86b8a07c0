"""The page: warnings first, then what they rest on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files

from enchtable_vllm.page import Html, cell, heading, label, page, paragraph, table, text
from enchtable_vllm.report.cells import Measure, by_stack, place
from enchtable_vllm.report.charts import columns, histogram, number, ranges
from enchtable_vllm.report.facts import Facts
from enchtable_vllm.report.heatmap import Grid, heat_map, layout
from enchtable_vllm.report.live import live

TITLES: dict[Measure, tuple[str, str]] = {
    "interference": (
        "Interference",
        "How much of a delta lies where the fine-tune changed the model. High: they collide.",
    ),
    "attenuation": (
        "Attenuation",
        "What is left of a delta because of it: exp(−interference). Low: little is added.",
    ),
    "coefficient": (
        "Coefficient",
        "What multiplies a delta: norm scale × attenuation.",
    ),
    "retained_share": (
        "Retained share",
        "How much of the change is expected to survive rounding to the task model's dtype.",
    ),
}
_MOST_MATRICES = 60
_MOST_MODULES = 60
_MOST_NAMES = 400
_MOST_HARD = 20
#: Algorithms that factor a matrix, the cheapest first; see docs/method.md.
_RUNGS = {
    "zero": "nothing to compute: a zero matrix, or too thin",
    "gram32": "fp32 eigenvectors, the fast way",
    "deflated32": "fp32 eigenvectors, a few strong directions apart",
    "gram64": "fp64 eigenvectors, where fp32 does not settle it",
    "svd64": "fp64 SVD, the slowest; for thin matrices the fastest",
}
_SECTIONS = {
    "summary": "Summary",
    "provenance": "Where it comes from",
    "layers": "Layer by layer",
    "spread": "Distributions",
    "norms": "Norms",
    "matrices": "Matrices that get least",
    "tensors": "Merged, kept, refused",
    "effort": "What was slow to plan",
}


def report_page(facts: Facts) -> str:
    """The page's text; the same for the same facts."""
    grid = layout(facts.grid)
    task = next(link.name for link in facts.origin if link.role == "task model")
    parts = [_warnings(facts), _menu(facts)]
    for anchor, body in {
        "summary": [_summary(facts)],
        "provenance": _origin(facts),
        "layers": list(_layers(grid)),
        "spread": list(_spread(facts)),
        "norms": list(_norms(facts)),
        "matrices": _matrices(facts),
        "tensors": list(_tensors(facts)),
        "effort": list(_effort(facts)),
    }.items():
        parts += [heading(_SECTIONS[anchor], anchor), *body]
    if facts.served is not None:
        parts += [heading("What the server says", "server"), *live(facts.served)]
    folder = files(__package__)
    return page(
        f"Merge report of {task}",
        parts,
        style=(folder / "report.css").read_text(encoding="utf-8"),
        script=(folder / "report.js").read_text(encoding="utf-8"),
    )


def _warnings(facts: Facts) -> Html:
    if not facts.warnings:
        return Html('<p class="fine">Nothing to warn of.</p>')
    items = "".join(f"<li>{text(warning)}</li>" for warning in facts.warnings)
    word = "warning" if len(facts.warnings) == 1 else "warnings"
    return Html(
        f'<section class="warnings" aria-labelledby="warnings">'
        f'<h2 id="warnings">{len(facts.warnings)} {word}</h2><ul>{items}</ul></section>'
    )


def _menu(facts: Facts) -> Html:
    names = _SECTIONS | ({"server": "What the server says"} if facts.served else {})
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in names.items())
    return Html(f'<nav aria-label="Sections"><ul>{links}</ul></nav>')


def _summary(facts: Facts) -> Html:
    counts = dict.fromkeys(("merged", "kept", "refused"), 0)
    for fate in facts.fates:
        counts[fate.what] += len(fate.names)
    shares = {
        "merged tensors": f"{counts['merged']:,}",
        "matrices": f"{len(facts.matrices):,}",
        "kept tensors": f"{counts['kept']:,}",
        **({"refused tensors": f"{counts['refused']:,}"} if counts["refused"] else {}),
        "beta": f"{facts.norms.beta:g}",
        "median attenuation": number(facts.overall["attenuation"].median),
        "expected retained share": "not known"
        if facts.expected_retained_share is None
        else f"{facts.expected_retained_share:.1%}",
    }
    if facts.merged is not None:
        shares["measured retained share"] = f"{facts.merged.retained_share:.1%}"
        shares["cosine"] = number(facts.merged.cosine)
    if facts.kept_share is not None:
        shares["masks keep"] = f"{facts.kept_share:.1%}"
    tiles = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in shares.items()
    )
    return Html(f'<dl class="tiles">{tiles}</dl>')


def _origin(facts: Facts) -> list[Html]:
    rows = [
        (
            link.role,
            Html(
                f"{label(link.name)}<br><small>{text(link.about)}</small><br>"
                + (f"<code>{text(link.digest)}</code> " if link.digest else "no digest ")
                + f"<small>{text(link.covers)}</small>"
            ),
        )
        for link in facts.origin
    ]
    return [table(("step", "what, and the digest that pins it"), rows)]


def _layers(grid: Grid) -> Iterator[Html]:
    if not grid.cells:
        yield paragraph("No tensor that is merged belongs to a layer.", "note")
        return
    yield paragraph(
        "The stronger the colour, the higher the value. Of several matrices in one cell, such as "
        "a layer's experts, the median. Point at a cell, or move with the arrow keys.",
        "note",
    )
    if grid.left_out:
        yield paragraph(
            f"{grid.left_out:,} further cells are not drawn, for want of room: 'enchtable report "
            "--json' has them.",
            "warning",
        )
    for measure, (title, words) in TITLES.items():
        yield heat_map(grid, measure, title, words)


def _spread(facts: Facts) -> Iterator[Html]:
    columns_of: dict[Measure, list[float]] = {
        "interference": [m.interference for m in facts.matrices],
        "attenuation": [m.attenuation for m in facts.matrices],
        "coefficient": [m.coefficient for m in facts.matrices],
    }
    shares = {m.name: m.retained_share for m in facts.matrices if m.retained_share is not None}
    drawn = [
        histogram(values, TITLES[measure][0], "", "matrix", "matrices")
        for measure, values in columns_of.items()
    ]
    if shares:
        title = TITLES["retained_share"][0]
        drawn.append(histogram(list(shares.values()), title, "", "tensor", "tensors"))
    yield Html(f'<div class="side-by-side">{"".join(drawn)}</div>')
    groups: dict[str, list[float]] = defaultdict(list)
    for matrix in facts.matrices:
        groups[place(matrix.name)[1]].append(matrix.attenuation)
    words = "Line: least to most; bar: the middle half; stroke: the median."
    if len(groups) > _MOST_MODULES:
        words += f" The first {_MOST_MODULES} of {len(groups):,} are shown."
    yield ranges(sorted(groups.items())[:_MOST_MODULES], "Attenuation by module", words)


def _norms(facts: Facts) -> Iterator[Html]:
    norms = facts.norms
    yield table(
        ("", ""),
        [
            (cell("‖T‖", "task vector: task model − base model"), number(norms.task)),
            (cell("‖S‖", "safety vector, over what is merged"), number(norms.safety)),
            (cell("n", "norm scale, β · ‖T‖ / ‖S‖"), number(norms.norm_scale)),
            (cell("‖c · S‖", "the change that is planned, before rounding"), number(norms.change)),
            (
                cell("‖c · S‖ / ‖T‖", "β, less what attenuation takes away"),
                f"{norms.change / norms.task:.4g}",
            ),
        ],
    )
    stacks = list(by_stack(facts.grid))
    for stack, cells in stacks:
        layers: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for one in cells:
            if one.layer is not None:
                layers[one.layer].append((one.safety_norm, one.change_norm))
        values = [
            (layer, math.hypot(*(s for s, _ in rows)), math.hypot(*(c for _, c in rows)))
            for layer, rows in sorted(layers.items())
        ]
        title = "Planned change by layer" + (f": {stack}" if len(stacks) > 1 else "")
        yield columns(values, title, "‖c · S‖ of each layer: how far it is to be moved.")


def _matrices(facts: Facts) -> list[Html]:
    least = sorted(facts.matrices, key=lambda m: (m.attenuation, m.name))[:_MOST_MATRICES]
    rows = [
        (
            cell(label(m.name), "" if m.expert is None else f"matrix {m.expert} of its stack"),
            number(m.interference),
            number(m.attenuation),
            number(m.coefficient),
            "–" if m.retained_share is None else number(m.retained_share),
        )
        for m in least
    ]
    head = ("tensor", "interference", "attenuation", "coefficient", "retained share")
    caption = f"{len(least)} of {len(facts.matrices):,}, least attenuation first"
    return [table(head, rows, caption=caption, kind="sortable")]


def _tensors(facts: Facts) -> Iterator[Html]:
    rows = [
        (fate.what, cell(f"{len(fate.names):,}", label(fate.names[0])), text(fate.why))
        for fate in facts.fates
    ]
    yield table(("fate", "tensors, the first of them", "why"), rows)
    yield paragraph(
        "Kept: bit for bit as in the task model. Refused: of the base model or the vector, not in "
        "the task model.",
        "note",
    )
    for fate in facts.fates:
        shown = "".join(f"<li>{label(name)}</li>" for name in fate.names[:_MOST_NAMES])
        rest = len(fate.names) - _MOST_NAMES
        more = f"<li>and {rest:,} more</li>" if rest > 0 else ""
        yield Html(
            f"<details><summary>{len(fate.names):,} {fate.what}: {text(fate.why)}</summary>"
            f'<ul class="names">{shown}{more}</ul></details>'
        )


def _effort(facts: Facts) -> Iterator[Html]:
    if facts.seconds:
        slowest = sorted(facts.seconds.items(), key=lambda item: -item[1])[:_MOST_HARD]
        total = sum(facts.seconds.values())
        yield table(
            ("tensor", "seconds", "share of all"),
            [(label(name), number(s), f"{s / (total or 1):.1%}") for name, s in slowest],
            caption=f"{len(slowest)} of {len(facts.seconds):,} tensors, the slowest first, by "
            f"the time of their linear algebra: {number(total)} seconds in all, added up over "
            "what ran at once",
            kind="sortable",
        )
    yield paragraph(
        "A plan is the same bytes wherever it is made, so it holds no times. It says which "
        "algorithm each factorisation needed; the later ones in this table are the slower ones.",
        "note",
    )
    rows = [(name, f"{facts.rungs[name]:,}", about) for name, about in _RUNGS.items()
            if name in facts.rungs]  # fmt: skip
    if not rows:
        yield paragraph("This plan does not say.")
        return
    yield table(("algorithm", "factorisations", "what it is"), rows)
    order = list(_RUNGS)
    hard = sorted(
        (m for m in facts.matrices if {"gram64", "svd64"} & set(m.rungs)),
        key=lambda m: sorted((order.index(rung) for rung in m.rungs), reverse=True),
        reverse=True,
    )
    if hard:
        yield table(
            ("tensor", "task delta", "safety delta"),
            [
                (cell(label(m.name), "" if m.expert is None else f"matrix {m.expert}"), *m.rungs)
                for m in hard[:_MOST_HARD]
            ],
            caption=f"{min(len(hard), _MOST_HARD)} of {len(hard):,} that needed fp64, "
            "the slower algorithms first",
        )
