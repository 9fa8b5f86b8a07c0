"""A plan in a few lines: how each kind of module fares."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from enchtable_vllm.plan.merge_plan import MergePlan, PlannedTensor

Spread = tuple[float, float, float]


@dataclass(frozen=True)
class KindSummary:
    """All merged tensors of one kind, such as ``self_attn.q_proj``.

    Attributes:
        kind: The tensor name without layer and expert numbers.
        matrices: How many matrices.
        interference: Minimum, median, maximum.
        attenuation: Likewise.
        retained_share: The mean expected retained share.
    """

    kind: str
    matrices: int
    interference: Spread
    attenuation: Spread
    retained_share: float

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return asdict(self)


def summarize(plan: MergePlan) -> list[KindSummary]:
    """One summary for each kind of merged tensor, in name order."""
    kinds: dict[str, list[PlannedTensor]] = {}
    for name, tensor in plan.merged.items():
        kinds.setdefault(module_kind(name), []).append(tensor)
    return [
        KindSummary(
            kind,
            sum(len(t.a) for t in tensors),
            _spread([x for t in tensors for x in t.interference]),
            _spread([x for t in tensors for x in t.attenuation]),
            statistics.fmean(t.retained_share or 0.0 for t in tensors),
        )
        for kind, tensors in sorted(kinds.items())
    ]


def module_kind(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``self_attn.q_proj``."""
    parts = re.split(r"\.\d+\.", name.removesuffix(".weight"))
    return ".".join(parts[1:]) or name


def _spread(values: Sequence[float]) -> Spread:
    return min(values), statistics.median(values), max(values)
