"""Models with their vectors, made in the scratch folder: what is loaded."""

from __future__ import annotations

from pathlib import Path

from benchmarks import models
from benchmarks.load_worker import Case

STORED: tuple[models.Stored, ...] = ("bf16", "int8")


def case(which: str, folder: Path) -> Case:
    """What `make` made."""
    task = models.task_model("small", folder) if which == "small" else folder / "task"
    vectors: dict[str, tuple[Path, Path]] = {
        stored: (folder / stored, folder / f"{stored}.json") for stored in STORED
    }
    return Case(models.NAMES[which], task, vectors, folder)


def make(which: str, folder: Path) -> Case:
    """A model of `models.NAMES`, a vector of each kind, and their plans."""
    folder.mkdir()
    task = models.task_model(which, folder / "task")
    made = case(which, folder)
    for stored in STORED:
        path, plan = made.vectors[stored]
        vector = models.random_vector(task, path, stored)
        plan.write_text(models.plan_without_interference(task, vector).to_json())
    return made
