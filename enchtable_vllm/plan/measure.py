"""One pass over a tensor: its digest, its norms, and how the vector interferes with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from enchtable_vllm.checkpoint import Checkpoint, tensor_digest
from enchtable_vllm.checkpoint.norm import finite_norm
from enchtable_vllm.errors import MismatchError
from enchtable_vllm.plan.interference import interference_terms
from enchtable_vllm.plan.journal import Journal, Terms
from enchtable_vllm.vector import SafetyVector, VectorTensor
from enchtable_vllm.vector.factor_files import FactorFiles, matrices
from enchtable_vllm.vector.factors import Factors, factor
from enchtable_vllm.vector.format import spread_sample

#: The share of sampled values that must be the aligned model's own.
_ALIKE = 0.75


#: The digests of what a tensor's terms are found from: task tensor, base tensor and delta.
Digests = tuple[str, str, str]


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        digest: Of the task tensor's bytes.
        delta_norm, base_norm: ‖task − base‖ and ‖base‖, where both have one shape.
        is_matrix: Whether it has more than one dimension.
        foreign: Whether the vector was built from another base tensor than this one.
        terms: If it is merged.
    """

    digest: str
    delta_norm: float = 0.0
    base_norm: float = 0.0
    is_matrix: bool = False
    foreign: bool = False
    terms: Terms | None = None


@dataclass(frozen=True)
class Measurement:
    """The inputs of a plan, and how to measure a tensor of theirs. Safe to share among threads.

    Attributes:
        task, base, vector: The three.
        factors: The vector's, where they are cached.
        rank_fraction, device: γ, and where the linear algebra runs.
        journal: What knows some outcomes from before, if anything does.
        elsewhere: Finds a tensor's terms on another machine or device, from the same bytes;
            None: here.
    """

    task: Checkpoint
    base: Checkpoint
    vector: SafetyVector
    factors: FactorFiles | None
    rank_fraction: float
    device: str
    journal: Journal | None = None
    elsewhere: Callable[[str, Digests], Terms] | None = None

    def measure(self, name: str, *, in_norm: bool, merged: bool) -> Measured:
        """Measure one tensor of the task model.

        Args:
            name: Which.
            in_norm: Whether it has one shape in task and base model.
            merged: Whether the vector is merged into it.

        Raises:
            CheckpointError, SafetyVectorError, NonFiniteError: It is damaged.
        """
        stored = self.task.read(name)
        digest = tensor_digest(stored)
        if not in_norm:
            return Measured(digest)
        before = self.base.read(name)
        delta = stored.float() - before.float()
        delta_norm = finite_norm(delta, f"{self.task.what}, tensor '{name}'")
        base_norm = finite_norm(before, f"{self.base.what}, tensor '{name}'")
        is_matrix = delta.ndim > 1
        if not merged:
            return Measured(digest, delta_norm, base_norm, is_matrix)
        entry = self.vector.tensors[name]
        foreign = not _is_aligned(before, entry)
        if self.journal is None and self.elsewhere is None:  # nobody asks for the digests
            terms = self._terms(name, delta)
        else:
            digests = (digest, tensor_digest(before), entry.digest)
            if self.elsewhere is not None:
                del stored, before, delta  # not held while another machine is at work
            terms = self._remembered(name, digests, None if self.elsewhere else delta)
        return Measured(digest, delta_norm, base_norm, is_matrix, foreign, terms)

    def terms(self, name: str, digests: Digests) -> Terms:
        """Find a tensor's terms, for whoever has seen its bytes.

        Raises:
            MismatchError: The bytes are others here.
        """
        stored, before = self.task.read(name), self.base.read(name)
        found = (tensor_digest(stored), tensor_digest(before), self.vector.tensors[name].digest)
        if found != digests:
            raise MismatchError(
                f"tensor '{name}' of task model, base model and safety vector",
                expected=f"the content that the planning process has, {digests}",
                got=found,
                fix="Give every machine of the cluster the same files under the same paths.",
            )
        return self._terms(name, stored.float() - before.float())

    def _remembered(self, name: str, digests: Digests, delta: torch.Tensor | None) -> Terms:
        def find() -> Terms:
            if delta is None:
                assert self.elsewhere is not None
                return self.elsewhere(name, digests)
            return self._terms(name, delta)

        return find() if self.journal is None else self.journal.remember(name, digests, find)

    def _terms(self, name: str, delta: torch.Tensor) -> Terms:
        safety, norm = self.vector.dense(name)
        if delta.ndim < 2:
            return Terms(norm, (0.0,), (0.0,), ())
        cached = None if self.factors is None else self.factors.read(name)
        pairs: list[tuple[float, float]] = []
        rungs = []
        for i, (task_matrix, safety_matrix) in enumerate(
            zip(matrices(delta), matrices(safety), strict=True)
        ):
            first = self._factor(task_matrix)
            second = self._factor(safety_matrix) if cached is None else self._placed(cached[i])
            pairs.append(interference_terms(first, second))
            rungs.append((first.rung, second.rung))
        return Terms(norm, tuple(a for a, _ in pairs), tuple(b for _, b in pairs), tuple(rungs))

    def _factor(self, matrix: torch.Tensor) -> Factors:
        return factor(matrix.to(self.device), self.rank_fraction)

    def _placed(self, factors: Factors) -> Factors:
        return replace(
            factors, left=factors.left.to(self.device), right=factors.right.to(self.device)
        )


def _is_aligned(before: torch.Tensor, entry: VectorTensor) -> bool:
    """Whether a base tensor is the aligned model's, whatever 16-bit format either is stored in."""
    expected = torch.tensor(entry.aligned_sample, dtype=torch.float32, device="cpu")
    found = spread_sample(before)
    if found.shape != expected.shape:
        return False
    # 2^-7 covers two roundings to bf16; 6e-8, half of fp16's smallest number.
    close = (found - expected).abs() <= expected.abs() * 2.0**-7 + 6e-8
    return float(close.float().mean()) >= _ALIKE
