"""Computing a merge plan: one streaming pass for norms and interference, one for the outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from enchtable_kernels import Effect, fused_add, pack_keep
from enchtable_vllm.checkpoint import Checkpoint, Location
from enchtable_vllm.errors import ConfigError, MismatchError, summarize_faults
from enchtable_vllm.plan.classify import classify
from enchtable_vllm.plan.cluster import Inputs, cluster
from enchtable_vllm.plan.journal import Journal, Terms
from enchtable_vllm.plan.masks import MaskOptions, MaskWriter, keep_mask
from enchtable_vllm.plan.measure import Digests, Measured, Measurement
from enchtable_vllm.plan.merge_plan import (
    MergePlan,
    PlannedTensor,
    VectorLocation,
    VectorReference,
)
from enchtable_vllm.plan.resolve import beyond_measure, coefficient, norm_scale
from enchtable_vllm.progress import Progress, silent
from enchtable_vllm.vector import ModelReference, SafetyVector, Scope
from enchtable_vllm.vector.factor_files import open_factors
from enchtable_vllm.vector.factors import COMPUTATION, check_rank_fraction
from enchtable_vllm.vector.workers import in_order, worker_count, workers

#: A fine-tune moves weights by a few per cent of their norm; unrelated weights differ by √2.
_UNRELATED = 1.0


@dataclass(frozen=True)
class PlanOptions:
    """What a user may choose.

    Attributes:
        beta: β.
        rank_fraction: γ.
        scope: None: the vector's own.
        device: Where the linear algebra runs.
        allow_other_base: Whether the vector may come from another base model.
        jobs: How many tensors at once; None: see `worker_count`. It does not change the plan.
        executor: Where the linear algebra is done: in ``threads`` of this process, or by
            ``ray`` on a cluster. It does not change the plan either, on like machines.
        masks: Which elements take part; by default all.
    """

    beta: float = 0.1
    rank_fraction: float = 0.5
    scope: Scope | None = None
    device: str = "cpu"
    allow_other_base: bool = False
    jobs: int | None = None
    executor: Literal["threads", "ray"] = "threads"
    masks: MaskOptions = field(default_factory=MaskOptions)

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(
                "beta", expected="a positive, finite number", got=self.beta, fix="Start at 0.1."
            )
        check_rank_fraction(self.rank_fraction)
        worker_count(self.jobs, self.device)


def compute_plan(
    task_location: Location,
    base_location: Location,
    vector: SafetyVector,
    options: PlanOptions,
    *,
    vector_location: VectorLocation | None = None,
    mask_writer: MaskWriter | None = None,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> MergePlan:
    """Measure interference for every merged tensor. Memory: a few tensors for each job.

    Args:
        task_location: The fine-tuned model.
        base_location: What it was fine-tuned from.
        vector: The safety vector of that base; its cached factors are used if they are there.
        options: β, γ, scope, device.
        vector_location: Recorded in the plan.
        mask_writer: Where masks go; to be given if the options ask for any.
        journal: Where finished tensors are written down, and found again after an interruption.
        progress: Called with each tensor's name, steps done, and steps in all.

    Returns:
        The plan. The same inputs give the same bytes: with cached factors or without, resumed
        or in one go, on one core or many.

    Raises:
        MismatchError: The three do not belong together, or task and base are identical.
        CheckpointError, SafetyVectorError, NonFiniteError: An input is damaged.
    """
    task = Checkpoint(task_location.path, what="task model")
    base = Checkpoint(base_location.path, what="base model")
    for checkpoint in (task, base):
        checkpoint.refuse_quantized()
    scope = options.scope or vector.manifest.scope
    classes = classify(task, base, vector, scope)
    task_model = ModelReference.of(task_location, task)
    base_model = ModelReference.of(base_location, base)
    measurement = Measurement(
        task,
        base,
        vector,
        open_factors(vector, options.rank_fraction, options.device),
        options.rank_fraction,
        options.device,
        journal,
    )
    if journal is not None:
        shapes = [task.tensors[name].shape for name in classes.merge]
        journal.begin(
            (
                task_model.fingerprint,
                base_model.fingerprint,
                vector.fingerprint,
                repr(options.rank_fraction),
                f"computation {COMPUTATION}, torch {torch.__version__}, {options.device}",
            ),
            matrices=sum(shape[0] if len(shape) == 3 else 1 for shape in shapes),
        )
    merged, in_norm = set(classes.merge), set(classes.in_norm)
    steps = len(task.tensors) + len(merged)
    measured: dict[str, Measured] = {}
    coefficients: dict[str, tuple[float, ...]] = {}
    effects: dict[str, Effect] = {}
    keep_digests: dict[str, str] = {}

    def measure(name: str) -> Measured:
        return measurement.measure(name, in_norm=name in in_norm, merged=name in merged)

    def add(name: str) -> tuple[Effect, torch.Tensor | None]:
        stored, delta = task.read(name), vector.read(name)
        keep_bits = None
        if options.masks:
            moved = stored.float() - base.read(name).float()
            keep_bits = pack_keep(keep_mask(delta.float(), moved, options.masks))
        _, sums = fused_add(
            stored, delta.values, coefficients[name], scales=delta.scales, keep_bits=keep_bits
        )
        effect = Effect.from_tensor(sums)
        if not (math.isfinite(effect.intended_sq) and math.isfinite(effect.overlap)):
            raise beyond_measure(options.beta, f"additions beyond fp32 to '{name}'")
        return effect, keep_bits

    if options.masks:
        assert mask_writer is not None, "masks are asked for, and have no place to go"
        mask_writer.begin({name: vector.tensors[name].shape for name in classes.merge})
    inputs = Inputs(
        task.folder,
        base.folder,
        vector.location.path,
        vector.fingerprint,
        options.rank_fraction,
        torch.device(options.device).type,
    )
    with _executor(options, inputs) as (pool, jobs, elsewhere):
        measurement = replace(measurement, elsewhere=elsewhere)
        for name, seen in in_order(pool, measure, task.tensors, jobs):
            measured[name] = seen
            progress(name, len(measured), steps)
        task_norm = _task_norm(measured.values(), task, base)
        if not options.allow_other_base:
            _check_aligned(measured, vector, base)
        terms = {name: seen.terms for name, seen in measured.items() if seen.terms is not None}
        n, safety_norm = norm_scale(
            options.beta, task_norm, (found.safety_norm for found in terms.values())
        )
        for name, found in terms.items():
            coefficients[name] = tuple(
                coefficient(n, a, b) for a, b in zip(found.a, found.b, strict=True)
            )
        for name, (effect, keep_bits) in in_order(pool, add, coefficients, jobs):
            effects[name] = effect
            if mask_writer is not None and keep_bits is not None:
                keep_digests[name] = mask_writer.write(name, keep_bits)
            progress(name, len(measured) + len(effects), steps)
    tensors = {
        name: PlannedTensor(action="keep", task_digest=measured[name].digest, reason=why)
        for name, why in classes.keep.items()
    }
    for name, found in terms.items():
        interference = tuple(a * n + b for a, b in zip(found.a, found.b, strict=True))
        tensors[name] = PlannedTensor(
            action="merge",
            task_digest=measured[name].digest,
            safety_norm=found.safety_norm,
            a=found.a,
            b=found.b,
            interference=interference,
            attenuation=tuple(math.exp(-x) for x in interference),
            coefficient=coefficients[name],
            rungs=found.rungs,
            keep_digest=keep_digests.get(name),
            retained_share=round(effects[name].retained_share, 6),
        )
    for checkpoint in (task, base):
        checkpoint.refuse_changed()
    total = sum(effects.values(), start=Effect())
    return MergePlan(
        task_model=task_model,
        base_model=base_model,
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
        masks=mask_writer.finish(options.masks) if mask_writer and options.masks else None,
        unused=classes.unused,
        tensors=dict(sorted(tensors.items())),
    )


@contextmanager
def _executor(
    options: PlanOptions, inputs: Inputs
) -> Iterator[tuple[ThreadPoolExecutor, int, Callable[[str, Digests], Terms] | None]]:
    """Threads, how many they are, and who does the linear algebra, if not they."""
    if options.executor == "threads":
        jobs = worker_count(options.jobs, options.device)
        with workers(jobs) as pool:
            yield pool, jobs, None
    else:
        with cluster(inputs) as machines:
            jobs = options.jobs or machines.slots + 1  # one more reads while they compute
            with workers(jobs) as pool:
                yield pool, jobs, machines.terms


def _task_norm(measured: Iterable[Measured], task: Checkpoint, base: Checkpoint) -> float:
    """‖T‖, after a look at whether it can be a fine-tune's."""
    measured = list(measured)
    task_norm = _norm(found.delta_norm for found in measured)
    if task_norm == 0.0:
        raise MismatchError(
            f"{task.what} and {base.what}",
            expected="a task model that differs from its base model",
            got="identical weights",
            fix="Give the fine-tuned model as task model and what it came from as base model.",
        )
    # Norms aside: their weights start at one, and are much alike in unrelated models.
    moved = _norm(found.delta_norm for found in measured if found.is_matrix)
    whole = _norm(found.base_norm for found in measured if found.is_matrix)
    if moved > _UNRELATED * whole:
        raise MismatchError(
            f"{task.what} and {base.what}",
            expected="the base model that the task model was fine-tuned from",
            got=f"matrices that differ by a norm of {moved:.6g}, which is more than the base "
            f"model's own, {whole:.6g}",
            fix="They are unrelated: give the right base model.",
        )
    return task_norm


def _norm(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def _check_aligned(
    measured: Mapping[str, Measured], vector: SafetyVector, base: Checkpoint
) -> None:
    foreign = [name for name, found in measured.items() if found.foreign]
    if foreign:
        raise MismatchError(
            f"{vector.what} and {base.what}",
            expected=f"the base model that the vector was built from, "
            f"'{vector.manifest.aligned.id}'",
            got=summarize_faults([f"other weights in '{name}'" for name in foreign]),
            fix="Build a vector for this base model; or, to use one of a close relative "
            "knowingly, plan with --allow-other-base.",
        )
