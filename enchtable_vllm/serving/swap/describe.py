"""What is served, for status, metrics and logs."""

from __future__ import annotations

import math
from typing import Any

from enchtable_vllm.errors import (
    EnchTableError,
    MemoryBoundError,
    NoPlanError,
    NotSwappableError,
    UnknownVectorError,
)
from enchtable_vllm.plan.summary import module_kind
from enchtable_vllm.serving.room import Active

#: What the HTTP interface calls a refusal; every other one is ``refused``.
_CODES: dict[type[EnchTableError], str] = {
    NoPlanError: "no_plan",
    UnknownVectorError: "unknown_vector",
    NotSwappableError: "not_swappable",
    MemoryBoundError: "does_not_fit",
}


def describe_error(error: BaseException) -> dict[str, Any]:
    """What went wrong, for another process: a code, and the error in words."""
    if isinstance(error, EnchTableError):
        message, fix = str(error).removesuffix(f" {error.fix}"), error.fix
    else:
        message = str(error) or type(error).__name__
        fix = "See the server's log."
    code = _CODES.get(type(error), "refused")  # type: ignore[arg-type]
    return {
        "code": code,
        "error": {"kind": type(error).__name__, "message": message, "fix": fix},
    }


def describe_active(active: Active) -> dict[str, Any]:
    """The ``active`` object of docs/http-api.md."""
    report = active.report
    found: dict[str, Any] = {
        "safety_vector": active.name,
        "weight_version": active.weight_version,
        "signed_by": active.signed_by,
        **active.identity,
    }
    if report is None:
        nothing = {"merged": 0, "kept": None, "filtered": 0, "refused": 0}
        return found | {"plan_beta": None, "norm_scale": None, **nothing}
    total, resolved = report.total, report.resolved
    return found | {
        "plan_beta": resolved.plan.beta,
        "norm_scale": resolved.norm_scale,
        "merged": len(report.effects),
        "kept": len(resolved.plan.tensors) - len(report.effects) - report.filtered,
        "filtered": report.filtered,
        "refused": len(resolved.plan.unused),
        "retained_share": total.retained_share,
        "cosine": total.cosine,
        "relative_error": total.relative_error,
        "attenuation_median": resolved.median_attenuation,
        "merged_digest": report.merged_digest,
        "merged_bytes": report.merged_bytes,
        "seconds": report.seconds,
        **vars(active.plan_source),
    }


def describe_modules(active: Active) -> dict[str, dict[str, list[float]]]:
    """Attenuation and interference in force, matrix by matrix, for each kind of module."""
    report = active.report
    if report is None:
        return {}
    resolved, found = report.resolved, dict[str, dict[str, list[float]]]()
    for name, row in resolved.coefficients.items():
        kind = found.setdefault(module_kind(name), {"attenuation": [], "interference": []})
        attenuations = [c / resolved.norm_scale for c in row]
        kind["attenuation"] += attenuations
        kind["interference"] += [-math.log(a) if a > 0 else math.inf for a in attenuations]
    return found
