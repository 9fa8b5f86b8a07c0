"""Merge plans: what is added to which tensor, decided once and reviewable."""

from enchtable_vllm.plan.compute import PlanOptions, compute_plan
from enchtable_vllm.plan.masks import MaskOptions, MergeMasks, open_masks
from enchtable_vllm.plan.merge_plan import (
    PLAN_FILE,
    MergePlan,
    PlannedTensor,
    VectorLocation,
    VectorReference,
)
from enchtable_vllm.plan.resolve import (
    ResolvedPlan,
    beyond_measure,
    plan_digest,
    read_plan,
    read_plan_bytes,
    resolve_plan,
)

__all__ = [
    "PLAN_FILE",
    "MaskOptions",
    "MergeMasks",
    "MergePlan",
    "PlanOptions",
    "PlannedTensor",
    "ResolvedPlan",
    "VectorLocation",
    "VectorReference",
    "beyond_measure",
    "compute_plan",
    "open_masks",
    "plan_digest",
    "read_plan",
    "read_plan_bytes",
    "resolve_plan",
]
