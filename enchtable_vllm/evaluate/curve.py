"""The safety/utility curve: as a picture for a page, and as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from enchtable_vllm.errors import ConfigError
from enchtable_vllm.evaluate.report import Rate
from enchtable_vllm.evaluate.tune_choice import Step
from enchtable_vllm.page import Html
from enchtable_vllm.page.svg import line, picture, word

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56
_COLOURS = {"unsafe": "#c0392b", "utility": "#2471a3", "over-refusal": "#8a6d1a"}


def curves(steps: Sequence[Step]) -> dict[str, list[tuple[float, Rate]]]:
    """By name, each rate over β, sorted; what has no value is left out."""
    tried = sorted((step.beta, step) for step in steps if step.beta is not None)
    found: dict[str, list[tuple[float, Rate]]] = {name: [] for name in _COLOURS}
    for beta, step in tried:
        for name, rate in zip(
            _COLOURS, (step.unsafe, step.utility, step.over_refusal), strict=True
        ):
            if rate is not None and rate.share is not None:
                found[name].append((beta, rate))
    return {name: points for name, points in found.items() if points}


def svg(steps: Sequence[Step], proposed: float | None) -> Html:
    """The picture in a page; β on a logarithmic axis, intervals as bars."""
    found = curves(steps)
    betas = sorted({beta for points in found.values() for beta, _ in points})
    if not betas:
        return Html("")
    low, high = math.log(betas[0]), math.log(betas[-1])

    def across(beta: float) -> float:
        share = 0.5 if high == low else (math.log(beta) - low) / (high - low)
        return _MARGIN + share * (_WIDTH - 2 * _MARGIN)

    def up(share: float) -> float:
        return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(_MARGIN, up(share), _WIDTH - _MARGIN, up(share), "#9aa5b4", 0.4))
        parts.append(word(_MARGIN - 8, up(share) + 4, f"{share:.0%}", "end"))
    for beta in betas:
        parts.append(word(across(beta), _HEIGHT - _MARGIN + 20, f"{beta:g}", "middle"))
    if proposed is not None:
        parts.append(line(across(proposed), up(0), across(proposed), up(1), "#1e8449", 1.5))
        parts.append(word(across(proposed), up(1) - 8, f"proposed: {proposed:g}", "middle"))
    for place, (name, points) in enumerate(found.items()):
        colour = _COLOURS[name]
        path = " ".join(f"{across(beta):.1f},{up(rate.share or 0.0):.1f}" for beta, rate in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for beta, rate in points:
            parts.append(line(across(beta), up(rate.low), across(beta), up(rate.high), colour, 1))
            centre = f'cx="{across(beta):.1f}" cy="{up(rate.share or 0.0):.1f}"'
            parts.append(f'<circle {centre} r="4" fill="{colour}"/>')
        parts.append(word(_MARGIN + 120 * place, 18, name, "start", colour))
    parts.append(word(_WIDTH / 2, _HEIGHT - 12, "beta", "middle"))
    return picture(_WIDTH, _HEIGHT, "rates over beta", parts)


def write_png(steps: Sequence[Step], proposed: float | None, path: Path) -> None:
    """The same, by matplotlib.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the curve as a PNG",
            expected="matplotlib",
            got=error,
            fix="Install it: pip install 'enchtable-vllm[evaluation]'.",
        ) from error
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in curves(steps).items():
        shares = [rate.share or 0.0 for _, rate in points]
        below = [
            max(0.0, share - rate.low) for share, (_, rate) in zip(shares, points, strict=True)
        ]
        above = [
            max(0.0, rate.high - share) for share, (_, rate) in zip(shares, points, strict=True)
        ]
        axes.errorbar(
            [beta for beta, _ in points], shares, yerr=[below, above], marker="o", capsize=3,
            label=name, color=_COLOURS[name],
        )  # fmt: skip
    if proposed is not None:
        axes.axvline(proposed, color="#1e8449", linestyle="--", label=f"proposed: {proposed:g}")
    axes.set_xscale("log")
    betas = sorted({beta for points in curves(steps).values() for beta, _ in points})
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("beta")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("share, 95% interval")
    axes.legend()
    figure.savefig(path, dpi=150)
