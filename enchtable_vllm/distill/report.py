"""What a distillation says of itself, beside the vector."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enchtable_vllm.distill.disentangle import Disentanglement
from enchtable_vllm.distill.linearity import Linearity
from enchtable_vllm.distill.pictures import draw, write_curve
from enchtable_vllm.distill.training import Step
from enchtable_vllm.vector import BuildReport

REPORT = "report.json"


@dataclass(frozen=True)
class DistilReport:
    """What came of it.

    Attributes:
        recipe: As in the manifest: settings, data, versions.
        curve: The loss curve.
        linearity: None where no pair was held out.
        disentanglement: None where no task was given.
        build: What the vector's builder found.
        pictures: The PNGs that were drawn.
    """

    recipe: dict[str, Any]
    curve: list[Step]
    linearity: Linearity | None
    disentanglement: Disentanglement | None
    build: BuildReport
    pictures: list[str]

    def to_json(self) -> dict[str, Any]:
        """``report.json``, less the manifest, which lies beside it."""
        disentanglement = self.disentanglement
        return {
            "recipe": self.recipe,
            "norm": self.build.manifest.norm,
            "tensors": len(self.build.manifest.tensors),
            "unchanged": list(self.build.unchanged),
            "linearity": None if self.linearity is None else asdict(self.linearity),
            "disentanglement": None
            if disentanglement is None
            else {**asdict(disentanglement), "mean": disentanglement.mean},
            "loss": [asdict(step) for step in self.curve],
            "pictures": self.pictures,
        }


def write_report(
    folder: Path,
    recipe: dict[str, Any],
    curve: list[Step],
    linearity: Linearity | None,
    disentanglement: Disentanglement | None,
    build: BuildReport,
) -> DistilReport:
    """``report.json``, ``loss.csv`` and the PNGs that can be drawn, into a vector's folder."""
    write_curve(folder, curve)
    pictures = draw(folder, curve, linearity, disentanglement)
    report = DistilReport(recipe, curve, linearity, disentanglement, build, pictures)
    text = json.dumps(report.to_json(), indent=2) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    return report
