"""What a person should look into, in plain words, the most serious first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence, Sized

from enchtable_vllm.merge.report import outcome_warnings
from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.report.cells import Matrix
from enchtable_vllm.report.printed import Merged
from enchtable_vllm.report.served import Served
from enchtable_vllm.vector import SafetyVector

#: Below this a matrix counts as one that gets little.
_LITTLE = 0.5
#: A measured share that is further from the expected one than this is not the plan's doing.
_APART = 0.05
#: Above this share of exact zeros a vector was built from checkpoints that rounded it away.
_MANY_ZEROS = 0.5


def concerns(
    resolved: ResolvedPlan,
    found: Sequence[Matrix],
    expected: float | None,
    vector: SafetyVector | None,
    merged: Merged | None,
    served: Served | None,
) -> list[str]:
    """Of a server first, because it answers people now; then of the plan, then of its parts.

    Args:
        resolved: The plan in force.
        found: Its matrices.
        expected: The retained share, where it is known.
        vector: If it was given.
        merged: What became of the plan offline, if that was given.
        served: What a server says, if one was asked.
    """
    warnings = [] if served is None else served.concerns(resolved)
    median = statistics.median(m.attenuation for m in found)
    warnings += outcome_warnings(median, 1.0 if expected is None else expected, resolved.beta)
    warnings += _of_matrices(resolved, found, median)
    if merged is not None and expected is not None:
        apart = merged.retained_share - expected
        if abs(apart) > _APART and merged.rounding == "nearest":
            warnings.append(
                f"the merge retained {merged.retained_share:.1%} of the intended change where the "
                f"plan expected {expected:.1%}: was it written in another dtype?"
            )
    if vector is not None and vector.manifest.zero_share > _MANY_ZEROS:
        warnings.append(
            f"{vector.manifest.zero_share:.0%} of the vector's elements are exactly zero: it was "
            "built from 16-bit checkpoints, in which small changes are lost; fp32 ones keep them"
        )
    return warnings


def _of_matrices(resolved: ResolvedPlan, found: Sequence[Matrix], median: float) -> list[str]:
    """Single matrices that fare badly though the whole does not."""
    warnings = []
    weak = [m for m in found if m.attenuation < _LITTLE]
    if weak and median >= _LITTLE:
        worst = min(weak, key=lambda m: m.attenuation)
        warnings.append(
            f"{_share(weak, found)} matrices keep less than half of the safety vector, "
            f"because it would interfere with the task; least of all {_name(worst)}, which keeps "
            f"{worst.attenuation:.1%}. A smaller beta leaves more of it"
        )
    shares = {m.name: m.retained_share for m in found if m.retained_share is not None}
    lost = [name for name, share in shares.items() if share < _LITTLE]
    if lost and len(lost) < len(shares):
        worst_name = min(lost, key=lambda name: shares[name] or 0.0)
        warnings.append(
            f"{_share(lost, shares)} tensors are expected to lose more than half of their "
            f"change to rounding; most: '{worst_name}', which retains {shares[worst_name]:.1%}"
        )
    silent = [n for n in resolved.coefficients if not resolved.plan.tensors[n].safety_norm]
    if silent:
        warnings.append(
            f"{_share(silent, resolved.coefficients)} tensors to merge are zero in the "
            f"safety vector, and stay as they are; '{silent[0]}' is the first"
        )
    return warnings


def _share(part: Sized, whole: Sized) -> str:
    return f"{len(part)} of {len(whole)}"


def _name(matrix: Matrix) -> str:
    expert = "" if matrix.expert is None else f", matrix {matrix.expert}"
    return f"'{matrix.name}'{expert}"
