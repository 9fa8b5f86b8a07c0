"""Curves as PNG, where matplotlib is there, and the loss curve as CSV, everywhere."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from enchtable_vllm.distill.disentangle import Disentanglement
from enchtable_vllm.distill.linearity import Linearity
from enchtable_vllm.distill.training import Step

LOSS_TABLE = "loss.csv"
LOSS_PICTURE = "loss.png"
LINEARITY_PICTURE = "linearity.png"
DISENTANGLEMENT_PICTURE = "disentanglement.png"


def write_curve(folder: Path, curve: Sequence[Step]) -> None:
    """``loss.csv``: a row for each step and each evaluation; what a row has not is empty."""
    with (folder / LOSS_TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Step)])
        table.writeheader()
        table.writerows(asdict(step) for step in curve)


def draw(
    folder: Path,
    curve: Sequence[Step],
    linearity: Linearity | None,
    disentanglement: Disentanglement | None,
) -> list[str]:
    """Draw what there is.

    Returns:
        The files' names; none where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figures: dict[str, Any] = {}
    figures[LOSS_PICTURE] = figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, key in (("training", "loss"), ("held out", "eval_loss")):
        points = [(s.step, y) for s in curve if (y := getattr(s, key)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if key != "loss" else "")
    axes.set(xlabel="step", ylabel="loss, as the trainer averages it")
    axes.legend()
    if linearity is not None:
        figures[LINEARITY_PICTURE] = figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, style in (("actual", "o-"), ("expanded", "--"), ("tangent", ":")):
            axes.plot(linearity.t, getattr(linearity, name), style, label=name)
        axes.set(
            xlabel="t: weights are aligned − t · safety vector",
            ylabel="loss of a held-out answer's token",
        )
        axes.legend()
    if disentanglement is not None:
        figures[DISENTANGLEMENT_PICTURE] = figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        ticks = range(len(disentanglement.alphas))
        labels = [f"{alpha:g}" for alpha in disentanglement.alphas]
        image = axes.imshow(disentanglement.error, origin="lower", vmin=0, vmax=2)
        axes.set(xlabel="safety vector × α₂", ylabel="task vector × α₁")
        axes.set_xticks(ticks, labels)
        axes.set_yticks(ticks, labels)
        figure.colorbar(image, label="disentanglement error ξ")
    for name, drawn in figures.items():
        drawn.savefig(folder / name, dpi=120)
    return list(figures)
