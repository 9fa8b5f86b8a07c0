"""How much a safety delta interferes with a task delta: the method's formula, made cheap.

With the leading k₁ singular triplets of the task delta T and k₂ of the safety delta n·S, the
method takes 200 · ‖(UᵀU − I) Σ (VᵀV − I)‖₁ / (k₁ + k₂)² over the joined bases. U₁ and U₂
each have orthonormal columns, so only two blocks of the product are not zero, and they are
``A Σ₂ B`` and ``Aᵀ Σ₁ Bᵀ`` with ``A = U₁ᵀU₂`` and ``B = V₂ᵀV₁``. With P = U₁ᵀT = Σ₁V₁ᵀ and
Q = U₂ᵀS = Σ₂V₂ᵀ the first is ``n · A · QPᵀ · Σ₁⁻¹`` and the second ``Aᵀ · PQᵀ · Σ₂⁻¹``: what is
needed of a matrix is its leading left singular vectors and their products with it, no full
decomposition. n scales the first block only, hence interference = a·n + b.

Left singular vectors come from the eigenvectors of the Gram matrix of the short side. That
squares the condition number, so there is a ladder: fp32 Gram where the kept singular values
stand well clear of fp32's noise, fp64 Gram where they stand clear of fp64's, SVD in fp64
elsewhere (and for small matrices, where it costs nothing).

Source: EnchTable (arXiv 2511.09880), interference-aware merging; the factors' counting rule
(numerical rank) is this project's, because without it rank-deficient deltas have no
well-defined value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Rung = Literal["gram32", "gram64", "svd64", "zero"]

#: Below this short side an fp64 SVD is the cheapest rung.
_SMALL_SIDE = 64
#: fp32 Gram: eigenvalues carry an error near 2⁻²⁴·side^½ of the largest, so a kept singular
#: value needs to stand above its square root by a comfortable factor.
_GRAM32_CLEARANCE = 0.1
#: fp64 Gram: likewise, 2⁻⁵³.
_GRAM64_CLEARANCE = 1e-5
_LADDER: tuple[tuple[Rung, torch.dtype, float], ...] = (
    ("gram32", torch.float32, _GRAM32_CLEARANCE),
    ("gram64", torch.float64, _GRAM64_CLEARANCE),
)
#: Singular values at or below max(rows, columns) · 2⁻²⁴ · σ₁ do not count.
_RANK_EPSILON = 2.0**-24


@dataclass(frozen=True)
class Factors:
    """The leading left singular vectors of a matrix and their products with it.

    The matrix lies on its short side: ``[short, long]``, transposed if it was tall.

    Attributes:
        left: ``[short, k]``: U's leading columns.
        right: ``[k, long]``: UᵀM = ΣVᵀ.
        sigma: ``[k]``: the singular values, in descending order.
        exponent: The matrix was scaled by 2^−exponent before all this.
        rung: Which algorithm was needed.
    """

    left: torch.Tensor
    right: torch.Tensor
    sigma: torch.Tensor
    exponent: int
    rung: Rung

    @property
    def rank(self) -> int:
        """k: the counted triplets."""
        return self.sigma.numel()


def factor(matrix: torch.Tensor, rank_fraction: float) -> Factors:
    """Leading factors of a matrix.

    Args:
        matrix: ``[rows, columns]`` fp32, finite, on any device.
        rank_fraction: γ: ⌊γ · min(rows, columns)⌋ triplets are kept, but never more than the
            numerical rank.

    Returns:
        Its factors; of rank 0 for a zero matrix or a short side of 1.
    """
    oriented = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    short, long = oriented.shape
    wanted = math.floor(rank_fraction * short)
    largest = float(oriented.abs().max()) if oriented.numel() else 0.0
    if wanted == 0 or largest == 0.0:
        empty = oriented.new_zeros
        return Factors(empty((short, 0)), empty((0, long)), empty(0), 0, "zero")
    exponent = max(math.frexp(largest)[1], -120)  # 2^-exponent stays within fp32
    scaled = oriented * 2.0**-exponent
    floor = max(short, long) * _RANK_EPSILON
    if short > _SMALL_SIDE:
        for rung, dtype, clearance in _LADDER:
            found = _gram(scaled.to(dtype), wanted, floor, clearance)
            if found is not None:
                return Factors(*found, exponent, rung)
    return Factors(*_svd(scaled.double(), wanted, floor), exponent, "svd64")


def _gram(
    matrix: torch.Tensor, wanted: int, floor: float, clearance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Factors by the Gram matrix, or None where this precision does not settle them."""
    try:
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in its stubs
        return None
    sigma = values.clamp_min(0).sqrt().flip(0)
    relative = sigma / sigma[0]
    kept = relative[:wanted]
    # Either every kept value is clear of the noise, or (fp64 only) the spectrum falls off a
    # cliff: values that count stand clear, and the rest is far below the counting threshold.
    counted = int((kept > max(floor, clearance)).sum())
    if counted < wanted:
        if matrix.dtype == torch.float32:
            return None
        rest = float(relative[counted])
        noise = math.sqrt(matrix.shape[1] * torch.finfo(matrix.dtype).eps)
        if rest > max(noise, floor / 4) or rest > floor:
            return None
    left = vectors.flip(1)[:, :counted].contiguous()
    right = left.mT @ matrix
    return left, right, torch.linalg.vector_norm(right, dim=1)


def _svd(
    matrix: torch.Tensor, wanted: int, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    counted = int((sigma[:wanted] > floor * sigma[0]).sum())
    kept = sigma[:counted]
    return left[:, :counted], kept[:, None] * right[:counted], kept


def interference_terms(task: Factors, safety: Factors) -> tuple[float, float]:
    """(a, b) of interference = a·n + b.

    Args:
        task: Of the task delta.
        safety: Of the safety delta, unscaled: n is not in it.

    Returns:
        Both finite and not negative. (0, 0) where either has rank 0: a task delta of zero
        leaves nothing to interfere with, and a side of 1 keeps no direction.
    """
    if task.rank == 0 or safety.rank == 0:
        return 0.0, 0.0
    dtype = torch.promote_types(task.left.dtype, safety.left.dtype)
    u1, u2 = task.left.to(dtype), safety.left.to(dtype)
    overlap = u1.mT @ u2  # A, [k1, k2]
    cross = safety.right.to(dtype) @ task.right.to(dtype).mT  # Σ₂ B Σ₁, [k2, k1]
    first = overlap @ (cross / task.sigma.to(dtype))  # A Σ₂ B
    second = overlap.mT @ (cross.mT / safety.sigma.to(dtype))  # Aᵀ Σ₁ Bᵀ
    normalizer = 200.0 / (task.rank + safety.rank) ** 2
    # The sums run in fp64; the power-of-two prescaling is undone here, exactly.
    a = math.ldexp(float(first.abs().sum(dtype=torch.float64)), safety.exponent)
    b = math.ldexp(float(second.abs().sum(dtype=torch.float64)), task.exponent)
    return normalizer * a, normalizer * b
