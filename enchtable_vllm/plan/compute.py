"""Computing a merge plan: one streaming pass for norms and interference, one for the outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from enchtable_kernels import Effect, fused_add
from enchtable_vllm.checkpoint import Checkpoint, Location, tensor_digest
from enchtable_vllm.checkpoint.norm import finite_norm
from enchtable_vllm.errors import ConfigError, MismatchError, summarize_faults
from enchtable_vllm.plan.classify import classify
from enchtable_vllm.plan.interference import Rung, factor, interference_terms
from enchtable_vllm.plan.merge_plan import (
    MergePlan,
    PlannedTensor,
    VectorLocation,
    VectorReference,
)
from enchtable_vllm.plan.resolve import coefficient, norm_scale
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector import ModelReference, SafetyVector, Scope, VectorTensor
from enchtable_vllm.vector.format import spread_sample

#: A fine-tune moves weights by a few per cent of their norm; unrelated weights differ by √2.
_UNRELATED = 1.0
#: The share of sampled values that must be the aligned model's own.
_ALIKE = 0.75


@dataclass(frozen=True)
class PlanOptions:
    """What a user may choose.

    Attributes:
        beta: β.
        rank_fraction: γ.
        scope: None: the vector's own.
        device: Where the linear algebra runs.
        allow_other_base: Whether the vector may come from another base model.
    """

    beta: float = 0.1
    rank_fraction: float = 0.5
    scope: Scope | None = None
    device: str = "cpu"
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(
                "beta", expected="a positive, finite number", got=self.beta, fix="Start at 0.1."
            )
        if not 0 < self.rank_fraction <= 1:
            raise ConfigError(
                "rank fraction",
                expected="a number above 0, at most 1",
                got=self.rank_fraction,
                fix="The method's own is 0.5.",
            )


@dataclass(frozen=True)
class _Terms:
    """Of one merged tensor, before the norm scale is known."""

    safety_norm: float
    a: tuple[float, ...]
    b: tuple[float, ...]
    rungs: tuple[tuple[Rung, Rung], ...]


def compute_plan(
    task_location: Location,
    base_location: Location,
    vector: SafetyVector,
    options: PlanOptions,
    *,
    vector_location: VectorLocation | None = None,
    progress: Progress = silent,
) -> MergePlan:
    """Measure interference for every merged tensor. Memory: a few tensors.

    Args:
        task_location: The fine-tuned model.
        base_location: What it was fine-tuned from.
        vector: The safety vector of that base.
        options: β, γ, scope, device.
        vector_location: Recorded in the plan.
        progress: Called with each tensor's name, steps done, and steps in all.

    Returns:
        The plan: the same inputs give the same bytes.

    Raises:
        MismatchError: The three do not belong together, or task and base are identical.
        CheckpointError, SafetyVectorError, NonFiniteError: An input is damaged.
    """
    with _exact_matmul():
        return _compute(task_location, base_location, vector, options, vector_location, progress)


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Full fp32 products: an engine may have allowed TF32, which the bounds do not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _compute(
    task_location: Location,
    base_location: Location,
    vector: SafetyVector,
    options: PlanOptions,
    vector_location: VectorLocation | None,
    progress: Progress,
) -> MergePlan:
    task = Checkpoint(task_location.path, what="task model")
    base = Checkpoint(base_location.path, what="base model")
    for checkpoint in (task, base):
        checkpoint.refuse_quantized()
    scope = options.scope or vector.manifest.scope
    classes = classify(task, base, vector, scope)
    steps = len(task.tensors) + len(classes.merge)
    merged, in_norm = set(classes.merge), set(classes.in_norm)
    digests: dict[str, str] = {}
    foreign: list[str] = []
    terms: dict[str, _Terms] = {}
    squares: list[float] = []
    matrix_squares: list[tuple[float, float]] = []  # of task delta and base, without norms
    for done, name in enumerate(task.tensors, 1):
        stored = task.read(name)
        digests[name] = tensor_digest(stored)
        if name in in_norm:
            before = base.read(name).float()
            delta = stored.float() - before
            squares.append(finite_norm(delta, f"{task.what}, tensor '{name}'") ** 2)
            if delta.ndim > 1:
                matrix_squares.append(
                    (squares[-1], finite_norm(before, f"{base.what}, tensor '{name}'") ** 2)
                )
            if name in merged:
                if not options.allow_other_base and not _is_aligned(before, vector.tensors[name]):
                    foreign.append(name)
                terms[name] = _terms(delta, vector.read(name).float(), options)
        progress(name, done, steps)
    task_norm = math.sqrt(math.fsum(squares))
    _check_related(task_norm, matrix_squares, task, base)
    if foreign:
        raise MismatchError(
            f"{vector.what} and {base.what}",
            expected=f"the base model that the vector was built from, "
            f"'{vector.manifest.aligned.id}'",
            got=summarize_faults([f"other weights in '{name}'" for name in foreign]),
            fix="Build a vector for this base model; or, to use one of a close relative "
            "knowingly, plan with --allow-other-base.",
        )
    n, safety_norm = norm_scale(
        options.beta, task_norm, (terms[name].safety_norm for name in classes.merge)
    )
    tensors = {
        name: PlannedTensor(action="keep", task_digest=digests[name], reason=why)
        for name, why in classes.keep.items()
    }
    total = Effect()
    for done, name in enumerate(classes.merge, len(task.tensors) + 1):
        found = terms[name]
        coefficients = tuple(coefficient(n, a, b) for a, b in zip(found.a, found.b, strict=True))
        added = vector.read(name)
        _, sums = fused_add(task.read(name), added.values, coefficients, scales=added.scales)
        effect = Effect.from_tensor(sums)
        total += effect
        interference = tuple(a * n + b for a, b in zip(found.a, found.b, strict=True))
        tensors[name] = PlannedTensor(
            action="merge",
            task_digest=digests[name],
            safety_norm=found.safety_norm,
            a=found.a,
            b=found.b,
            interference=interference,
            attenuation=tuple(math.exp(-x) for x in interference),
            coefficient=coefficients,
            rungs=found.rungs,
            retained_share=round(effect.retained_share, 6),
        )
        progress(name, done, steps)
    return MergePlan(
        task_model=ModelReference.of(task_location, task),
        base_model=ModelReference.of(base_location, base),
        safety_vector=VectorReference(
            name=vector.name, fingerprint=vector.fingerprint, location=vector_location
        ),
        beta=options.beta,
        rank_fraction=options.rank_fraction,
        scope=scope,
        task_norm=task_norm,
        safety_norm=safety_norm,
        norm_scale=n,
        retained_share=round(total.retained_share, 6),
        unused=classes.unused,
        tensors=dict(sorted(tensors.items())),
    )


def _is_aligned(before: torch.Tensor, entry: VectorTensor) -> bool:
    """Whether a base tensor is the aligned model's, whatever 16-bit format either is stored in."""
    expected = torch.tensor(entry.aligned_sample, dtype=torch.float32, device="cpu")
    found = spread_sample(before)
    # 2^-7 covers two roundings to bf16; 6e-8, half of fp16's smallest number.
    close = (found - expected).abs() <= expected.abs() * 2.0**-7 + 6e-8
    return found.shape == expected.shape and float(close.float().mean()) >= _ALIKE


def _terms(delta: torch.Tensor, safety: torch.Tensor, options: PlanOptions) -> _Terms:
    norm = finite_norm(safety, "safety vector")
    if delta.ndim < 2:
        return _Terms(norm, (0.0,), (0.0,), ())
    stack = (delta, safety) if delta.ndim == 3 else (delta[None], safety[None])
    pairs: list[tuple[float, float]] = []
    rungs: list[tuple[Rung, Rung]] = []
    for task_matrix, safety_matrix in zip(*stack, strict=True):
        task_factors = factor(task_matrix.to(options.device), options.rank_fraction)
        safety_factors = factor(safety_matrix.to(options.device), options.rank_fraction)
        pairs.append(interference_terms(task_factors, safety_factors))
        rungs.append((task_factors.rung, safety_factors.rung))
    return _Terms(norm, tuple(a for a, _ in pairs), tuple(b for _, b in pairs), tuple(rungs))


def _check_related(
    task_norm: float, squares: list[tuple[float, float]], task: Checkpoint, base: Checkpoint
) -> None:
    if task_norm == 0.0:
        raise MismatchError(
            f"{task.what} and {base.what}",
            expected="a task model that differs from its base model",
            got="identical weights",
            fix="Give the fine-tuned model as task model and what it came from as base model.",
        )
    moved = math.sqrt(math.fsum(delta for delta, _ in squares))
    whole = math.sqrt(math.fsum(before for _, before in squares))
    if moved > _UNRELATED * whole:
        raise MismatchError(
            f"{task.what} and {base.what}",
            expected="the base model that the task model was fine-tuned from",
            got=f"matrices that differ by a norm of {moved:.6g}, which is more than the base "
            f"model's own, {whole:.6g}",
            fix="They are unrelated: give the right base model.",
        )
