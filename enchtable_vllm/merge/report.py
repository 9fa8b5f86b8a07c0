"""The outcome of a merge, and the one line about it that a person can trust."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from enchtable_kernels import Effect
from enchtable_vllm.checkpoint import short
from enchtable_vllm.errors import printable
from enchtable_vllm.plan import ResolvedPlan

Rounding = Literal["nearest", "stochastic"]

#: Below this share, storage rounds most of the vector away.
_LOW_RETAINED_SHARE = 0.5
#: Below this median attenuation most of the vector is taken away as interference.
_LOW_ATTENUATION = 0.5


def outcome_warnings(attenuation: float, retained_share: float, beta: float) -> list[str]:
    """What is suspicious about an outcome, planned or achieved.

    Args:
        attenuation: The median over all matrices.
        retained_share: Over all tensors.
        beta: In force.
    """
    if attenuation < _LOW_ATTENUATION:
        return [
            f"at beta {beta:g} interference takes away {1 - attenuation:.0%} of the safety vector "
            "(median over matrices): use a smaller beta"
        ]
    if retained_share < _LOW_RETAINED_SHARE:
        return [
            f"only {retained_share:.0%} of the safety vector survives rounding, so this merge "
            "changes little: use a larger beta, or a checkpoint in fp32 that is served in fp32"
        ]
    return []


@dataclass
class MergeReport:
    """What one pass over a task model did.

    Attributes:
        resolved: The plan in force.
        effects: Merged tensor → what the addition did.
        rounding: How sums were rounded to the stored dtype.
        kept: How many tensors went through bit for bit.
        filtered: Tensors of the plan that this rank never sees (other ranks' experts).
        merged_bytes: Of the tensors that were merged.
        seconds: From the first tensor to the last.
        merged_digest: Of every merged byte, where that was asked for: equal for equal merges.
        notes: What else the user should know about what was written.
    """

    resolved: ResolvedPlan
    effects: dict[str, Effect] = field(default_factory=dict)
    rounding: Rounding = "nearest"
    kept: int = 0
    filtered: int = 0
    merged_bytes: int = 0
    seconds: float = 0.0
    merged_digest: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> Effect:
        """All additions together."""
        total = Effect()
        for effect in self.effects.values():
            total += effect
        return total

    def line(self) -> str:
        """Counts, effect, and the identity of everything that went in."""
        plan, total = self.resolved.plan, self.total
        weights = f"merged weights {short(self.merged_digest)}, " if self.merged_digest else ""
        rounding = "" if self.rounding == "nearest" else f", rounding {self.rounding}"
        return (
            f"safety vector merged: {len(self.effects)} merged, {self.kept} kept, "
            f"{self.filtered} filtered; retained share {total.retained_share:.3f}, "
            f"cosine {total.cosine:.3f}, relative error {total.relative_error:.3f}; "
            f"vector '{printable(plan.safety_vector.name)}' "
            f"{short(plan.safety_vector.fingerprint)}, "
            f"plan {short(self.resolved.digest)}, beta {self.resolved.beta:g}, "
            f"scope {self.resolved.scope}{rounding}; {weights}{self.seconds:.2f} s"
        )

    def warnings(self) -> list[str]:
        """What a person should look into, though the merge is exactly as planned."""
        return outcome_warnings(
            self.resolved.median_attenuation, self.total.retained_share, self.resolved.beta
        )

    def to_json(self) -> dict[str, object]:
        """For machines."""
        plan, total = self.resolved.plan, self.total
        return {
            "merged": len(self.effects),
            "kept": self.kept,
            "filtered": self.filtered,
            "retained_share": total.retained_share,
            "cosine": total.cosine,
            "relative_error": total.relative_error,
            "rounding": self.rounding,
            "safety_vector": plan.safety_vector.model_dump(mode="json", exclude_none=True),
            "merged_digest": self.merged_digest,
            "merged_bytes": self.merged_bytes,
            "plan_digest": self.resolved.digest,
            "beta": self.resolved.beta,
            "scope": self.resolved.scope,
            "norm_scale": self.resolved.norm_scale,
            "notes": self.notes,
            "seconds": self.seconds,
        }
