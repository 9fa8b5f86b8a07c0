"""The plots of docs/images/: SVG, with the digest of the figures that they were drawn from.

Two versions of matplotlib draw two files of the same figures, so what tells a stale plot is the
digest in its metadata, not its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.registry import REGISTRY
from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import ROOT, made_by

IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Curve:
    """One line of a plot, from left to right.

    Attributes:
        label: Its name.
        points: x and y.
        modelled: Drawn dashed: nobody measured it.
    """

    label: str
    points: Sequence[tuple[float, float]]
    modelled: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with logarithmic axes.

    Attributes:
        title, x, y: Its words.
        curves: What is drawn.
        rows: The rows of results that it shows.
        ticks: The places on the x axis that have a name; numbers, if none.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    rows: Sequence[Row]
    ticks: Mapping[float, str] | None = None

    @property
    def digest(self) -> str:
        """Of all that is to be seen."""
        words = [
            self.title,
            self.x,
            self.y,
            made_by(self.rows),
            self.ticks and sorted(self.ticks.items()),
        ]
        curves = [[c.label, c.modelled, *c.points] for c in self.curves]
        return hashlib.sha256(json.dumps([words, curves]).encode()).hexdigest()[:16]

    def svg(self) -> str:
        """Draw it."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({"svg.hashsalt": "enchtable", "font.size": 9}):
            figure = Figure(figsize=(7.2, 3.8), layout="constrained")
            axes = figure.subplots()
            for curve in self.curves:
                x, y = zip(*curve.points, strict=True)
                axes.plot(x, y, "o--" if curve.modelled else "o-", label=curve.label, markersize=4)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
            if self.ticks:
                axes.set_xticks(list(self.ticks), list(self.ticks.values()))
                axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            figure.text(
                0.99, -0.02, made_by(self.rows).strip("()"), ha="right", va="top", fontsize=6
            )
            file = io.StringIO()
            figure.savefig(
                file, format="svg", bbox_inches="tight",
                metadata={"Date": None, "Creator": None, "Description": f"figures {self.digest}"},
            )  # fmt: skip
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


Plots = Mapping[str, Callable[[Results], Plot]]


def plots() -> Plots:
    """Those of every benchmark."""
    found = [benchmark.shown("PLOTS") for benchmark in REGISTRY]
    return {name: make for source in found for name, make in source.items()}


def stale(
    results: Results | None = None, known: Plots | None = None, folder: Path = IMAGES
) -> Iterator[tuple[Path, str]]:
    """The plots that do not show the newest rows, drawn anew; what nobody measured has none."""
    for name, make in (plots() if known is None else known).items():
        path = folder / f"bench-{name}.svg"
        try:
            plot = make(results or Results())
        except NotMeasured:
            continue
        if not path.exists() or f"figures {plot.digest}" not in path.read_text():
            yield path, plot.svg()
