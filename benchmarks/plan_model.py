"""A whole model to plan: a task model, its base and a vector with and without factors."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.plan_cases import published_plan
from enchtable_vllm.checkpoint import Checkpoint, local
from enchtable_vllm.plan import MergePlan, PlanOptions, compute_plan
from enchtable_vllm.vector import SafetyVector, add_factors


class Model:
    """See above.

    Args:
        folder: For copies of the vector.
        paths: Task model, base model and vector.
        jobs: How many tensors at once; None: as many as the device likes.
        device: Where all of it is planned.
    """

    def __init__(
        self,
        folder: Path,
        paths: tuple[Path, Path, Path],
        *,
        jobs: int | None = None,
        device: str = "cpu",
    ) -> None:
        task, base, vector = paths
        self._ends = local(task), local(base)
        self._jobs, self._device = jobs, device
        self._vectors = {name: _copied(vector, folder / name) for name in ("cold", "cached")}
        add_factors(self._vectors["cached"], jobs=jobs, device=device, max_shard_bytes=10**10)
        self._vectors["cached"] = SafetyVector.open(folder / "cached")
        self._n = self.plan("cold").norm_scale

    def plan(self, which: str, device: str | None = None) -> MergePlan:
        """Ours, ``cold`` or ``cached``: files read, digests and outcome included."""
        options = PlanOptions(jobs=self._jobs, device=device or self._device, allow_other_base=True)
        return compute_plan(*self._ends, self._vectors[which], options)

    def published(self) -> float:
        """The peer's: the sum of all interferences."""
        task, base = (Checkpoint(end.path) for end in self._ends)
        return published_plan(task, base, self._vectors["cold"], self._n, self._device)


def _copied(vector: Path, target: Path) -> SafetyVector:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(vector, target, ignore=shutil.ignore_patterns("*factors*"))
    return SafetyVector.open(target)
