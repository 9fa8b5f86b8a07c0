"""From a plan to the coefficients in force: recomputed, never believed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from enchtable_vllm.checkpoint import Checkpoint
from enchtable_vllm.errors import ConfigError, MergePlanError, MismatchError, summarize_faults
from enchtable_vllm.files import read_json
from enchtable_vllm.plan.merge_plan import MergePlan
from enchtable_vllm.vector import SafetyVector, Scope, in_scope, narrows
from enchtable_vllm.vector.safety_vector import describe_fault

_TOLERANCE = 1e-9  # relative; the same arithmetic in the same order gives the same number


def beyond_measure(beta: float, additions: str) -> ConfigError:
    """A β with additions so large that their norm cannot be told; which, in words."""
    return ConfigError(
        "beta",
        expected="one whose additions can be measured",
        got=f"{beta:g}, with {additions}",
        fix="It is far too large: begin at 0.1.",
    )


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan with β and scope settled.

    Attributes:
        plan: As read.
        digest: blake3 of the plan file's bytes.
        beta, scope, norm_scale: In force.
        coefficients: Merged tensor → one number for each of its matrices.
        kept: Kept tensor → why.
    """

    plan: MergePlan
    digest: str
    beta: float
    scope: Scope
    norm_scale: float
    coefficients: Mapping[str, tuple[float, ...]]
    kept: Mapping[str, str]

    @property
    def median_attenuation(self) -> float:
        """Over all merged matrices."""
        rows = self.coefficients.values()
        return statistics.median(c / self.norm_scale for row in rows for c in row)

    def check_vector(self, vector: SafetyVector) -> None:
        """Refuse a vector that the plan was not made for.

        Raises:
            MismatchError: Its fingerprint differs.
        """
        expected = self.plan.safety_vector
        if vector.fingerprint != expected.fingerprint:
            raise MismatchError(
                f"merge plan and {vector.what}",
                expected=f"the vector that the plan was made for, '{expected.name}' "
                f"{expected.fingerprint}",
                got=vector.fingerprint,
                fix="Give that vector, or make a plan for this one with 'enchtable plan'.",
            )

    def check_task_model(self, fingerprint: str, what: str) -> None:
        """Refuse a task model that the plan was not made for.

        Raises:
            MismatchError: Its sampled fingerprint differs.
        """
        expected = self.plan.task_model
        if fingerprint != expected.fingerprint:
            raise MismatchError(
                f"merge plan and {what}",
                expected=f"the task model that the plan was made for, '{expected.id}' "
                f"{expected.fingerprint}",
                got=fingerprint,
                fix="Make a plan for this model with 'enchtable plan', or serve the other.",
            )

    def check_headers(self, task: Checkpoint, vector: SafetyVector) -> None:
        """Refuse a plan whose tensors are not those of task model and vector.

        Raises:
            MismatchError: All faults at once.
        """
        known = self.plan.tensors
        faults = [f"'{n}' is not in the plan" for n in task.tensors.keys() - known.keys()]
        faults += [f"'{n}' is not in the task model" for n in known.keys() - task.tensors.keys()]
        for name, row in self.coefficients.items():
            header, delta = task.tensors.get(name), vector.tensors.get(name)
            if header is None:
                continue
            stack = header.shape[0] if len(header.shape) == 3 else 1
            if delta is None:
                faults.append(f"'{name}' is not in the safety vector")
            elif delta.shape != header.shape:
                faults.append(
                    f"'{name}' is {list(header.shape)} in the task model, "
                    f"{list(delta.shape)} in the safety vector"
                )
            elif not header.is_float:
                faults.append(f"'{name}' is {header.dtype} in the task model")
            elif len(row) != stack:
                faults.append(f"'{name}' has {len(row)} coefficients for {stack} matrices")
            elif not math.isclose(known[name].safety_norm or 0.0, delta.norm, rel_tol=1e-6):
                faults.append(f"'{name}' has norm {delta.norm} in the vector")
            elif not in_scope(name, self.scope):
                faults.append(f"'{name}' is outside scope '{self.scope}'")
        if faults:
            raise MismatchError(
                f"merge plan, {task.what} and {vector.what}",
                expected="the same tensors in all three",
                got=summarize_faults(sorted(faults)),
                fix="Make the plan again with 'enchtable plan'.",
            )


def read_plan(path: Path) -> tuple[MergePlan, str]:
    """A plan file and its digest, of the same bytes.

    Raises:
        MergePlanError: It is missing, no file, not JSON, or not a plan.
    """
    plan, data = read_plan_bytes(path)
    return plan, plan_digest(data)


def read_plan_bytes(path: Path) -> tuple[MergePlan, bytes]:
    """A plan file, and the bytes that it was read from.

    Raises:
        MergePlanError: As `read_plan`.
    """
    try:
        _, data = read_json(path)
        return MergePlan.model_validate_json(data), data
    except OSError as error:
        raise MergePlanError(
            f"merge plan '{path}'",
            expected="a readable file",
            got=error,
            fix="Make one with 'enchtable plan', or check the path.",
        ) from error
    except ValueError as error:  # pydantic's ValidationError is one
        raise MergePlanError(
            f"merge plan '{path}'",
            expected="format version 1",
            got=describe_fault(error),
            fix="Make it again with 'enchtable plan'.",
        ) from error


def plan_digest(data: bytes) -> str:
    """``blake3:…`` of a plan file's bytes."""
    return f"blake3:{blake3(data).hexdigest()}"


def norm_scale(beta: float, task_norm: float, safety_norms: Iterable[float]) -> tuple[float, float]:
    """(n, ‖S‖): n = β · ‖T‖ / ‖S‖, with ‖S‖ over the tensors given.

    Raises:
        MergePlanError: ‖S‖ is zero, or n overflows or vanishes.
    """
    safety_norm = math.hypot(*safety_norms)
    scale = beta * task_norm / safety_norm if safety_norm > 0 else math.inf
    if not 0 < scale < math.inf:
        raise MergePlanError(
            "norm scale beta * |task vector| / |safety vector|",
            expected="a positive, finite number",
            got=f"{beta} * {task_norm} / {safety_norm}",
            fix="Use a vector that is not zero and a beta that is neither tiny nor huge.",
        )
    return scale, safety_norm


def resolve_plan(
    plan: MergePlan, digest: str, *, beta: float | None = None, scope: Scope | None = None
) -> ResolvedPlan:
    """Settle β and scope, and recompute every coefficient.

    Args:
        plan: As read.
        digest: Of its file.
        beta: Another β. a and b make it free.
        scope: A narrower scope. The result is what planning with that scope gives: ‖S‖ then
            runs over fewer tensors.

    Raises:
        ConfigError: A β that is not positive and finite, or a scope wider than the plan's.
        MergePlanError: The plan disagrees with itself, or merges nothing.
    """
    if beta is not None and not 0 < beta < math.inf:
        raise ConfigError(
            "beta",
            expected="a positive, finite number",
            got=beta,
            fix="A negative one would take safety away; none is not a merge.",
        )
    if scope is not None and not narrows(scope, plan.scope):
        raise ConfigError(
            "scope",
            expected=f"the plan's '{plan.scope}' or a part of it",
            got=f"'{scope}'",
            fix="Make a plan with that scope: 'enchtable plan --scope'.",
        )
    _check_own_numbers(plan)
    chosen = {n: t for n, t in plan.merged.items() if scope is None or in_scope(n, scope)}
    if not chosen:
        raise MergePlanError(
            "merge plan",
            expected="at least one tensor to merge",
            got=f"none in scope '{scope or plan.scope}'",
            fix="Choose another scope, or check that the vector belongs to this model.",
        )
    beta = plan.beta if beta is None else beta
    n, _ = norm_scale(beta, plan.task_norm, (t.safety_norm or 0.0 for t in chosen.values()))
    kept = {name: t.reason or "" for name, t in plan.tensors.items() if t.action == "keep"}
    kept |= dict.fromkeys(plan.merged.keys() - chosen.keys(), f"outside scope '{scope}'")
    coefficients = {
        name: tuple(coefficient(n, a, b) for a, b in zip(t.a, t.b, strict=True))
        for name, t in chosen.items()
    }
    if not all(math.isfinite(c) for row in coefficients.values() for c in row):
        raise MergePlanError(
            "merge plan",
            expected="finite coefficients",
            got=f"overflow at beta {beta}",
            fix="Use a smaller beta.",
        )
    return ResolvedPlan(plan, digest, beta, scope or plan.scope, n, coefficients, kept)


def coefficient(n: float, a: float, b: float) -> float:
    """N · exp(−(a·n + b)): what multiplies a delta."""
    return n * math.exp(-(a * n + b))


def _check_own_numbers(plan: MergePlan) -> None:
    """The plan's derived numbers must follow from its own inputs."""
    merged = plan.merged
    if not merged:
        raise MergePlanError(
            "merge plan",
            expected="at least one tensor to merge",
            got="none",
            fix="Check that the vector belongs to this model.",
        )
    n, safety_norm = norm_scale(
        plan.beta, plan.task_norm, (t.safety_norm or 0.0 for t in merged.values())
    )
    faults = []
    if not _close(n, plan.norm_scale) or not _close(safety_norm, plan.safety_norm):
        faults.append(f"norm_scale {plan.norm_scale!r} should be {n!r}")
    for name, t in merged.items():
        for i, (a, b) in enumerate(zip(t.a, t.b, strict=True)):
            expected = (a * n + b, math.exp(-(a * n + b)), coefficient(n, a, b))
            if not all(
                map(_close, expected, (t.interference[i], t.attenuation[i], t.coefficient[i]))
            ):
                faults.append(
                    f"'{name}' coefficient {t.coefficient[i]!r} should be {expected[2]!r}"
                )
    if faults:
        raise MergePlanError(
            "merge plan",
            expected="coefficients that follow from its norm scale, a and b",
            got=summarize_faults(faults),
            fix="It was edited by hand or damaged: make it again with 'enchtable plan'.",
        )


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-300)
