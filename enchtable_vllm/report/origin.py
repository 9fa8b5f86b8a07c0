"""Where the weights come from: each step of the way, and the digest that pins it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from enchtable_vllm.plan import ResolvedPlan
from enchtable_vllm.plan.merge_plan import VectorLocation
from enchtable_vllm.report.printed import Merged
from enchtable_vllm.report.served import Served
from enchtable_vllm.vector import ModelReference, SafetyVector


@dataclass(frozen=True)
class Link:
    """One artefact.

    Attributes:
        role: What it is in the method.
        name: Its own.
        digest: None where there is none.
        covers: What of it the digest pins.
        about: How it came to be, or what else is known of it.
    """

    role: str
    name: str
    digest: str | None
    covers: str
    about: str = ""


_SAMPLED = "names, shapes, and samples of the bytes"
_CONTENT = "every byte"


def chain(
    resolved: ResolvedPlan,
    vector: SafetyVector | None,
    merged: Merged | None,
    served: Served | None,
) -> Iterator[Link]:
    """From the base model to what is served; what is not known is left out."""
    plan = resolved.plan
    yield _model("base model", plan.base_model, "what the task model was fine-tuned from")
    yield _model("task model", plan.task_model, "the fine-tune that is given its safety back")
    if vector is not None:
        manifest = vector.manifest
        yield _model("aligned model", manifest.aligned, f"safe; {manifest.architecture}")
        yield _model("surrogate", manifest.surrogate, "the same, distilled toward compliance")
    reference = plan.safety_vector
    yield Link(
        "safety vector",
        reference.name,
        reference.fingerprint,
        _CONTENT,
        f"aligned model − surrogate; {_where(reference.location)}"
        + ("" if vector is None else f"; {_about(vector)}"),
    )
    changed = resolved.beta != plan.beta or resolved.scope != plan.scope
    yield Link(
        "merge plan",
        f"beta {resolved.beta:g}, scope {resolved.scope}, rank fraction {plan.rank_fraction:g}",
        resolved.digest,
        _CONTENT,
        f"made for beta {plan.beta:g}, scope {plan.scope}" if changed else "as it was made",
    )
    if merged is not None:
        yield Link(
            "merged weights",
            f"{merged.merged} tensors, rounded to the {merged.rounding}"
            if merged.rounding == "nearest"
            else f"{merged.merged} tensors, rounding {merged.rounding}",
            merged.merged_digest,
            "every merged byte",
            "written by 'enchtable merge'",
        )
    if served is not None:
        active = served.status.active
        yield Link(
            "server",
            f"{served.url}: {served.status.weight_version}",
            active.plan_digest,
            "the plan that it says it serves",
            f"asked {served.asked}",
        )


def _model(role: str, reference: ModelReference, about: str) -> Link:
    at = f" at {reference.revision}" if reference.revision else ""
    return Link(role, reference.id + at, reference.fingerprint, _SAMPLED, about)


def _where(location: VectorLocation | None) -> str:
    if location is None:
        return "to be named when the plan is used"
    if location.repo_id is not None:
        return f"repository {location.repo_id} at {location.commit}"
    return f"in the plan's folder, at {location.path}"


def _about(vector: SafetyVector) -> str:
    dtypes = sorted({tensor.dtype for tensor in vector.tensors.values()})
    return (
        f"{len(vector.tensors)} tensors as {', '.join(dtypes)}, scope {vector.manifest.scope}, "
        f"norm {vector.manifest.norm:.6g}, {vector.manifest.zero_share:.2%} exact zeros"
    )
