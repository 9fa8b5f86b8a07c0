"""How much a safety delta interferes with a task delta: the method's formula, made cheap.

With the leading k₁ singular triplets of the task delta T and k₂ of the safety delta n·S, the
method takes 200 · ‖(UᵀU − I) Σ (VᵀV − I)‖₁ / (k₁ + k₂)² over the joined bases. U₁ and U₂
each have orthonormal columns, so only two blocks of the product are not zero, and they are
``A Σ₂ B`` and ``Aᵀ Σ₁ Bᵀ`` with ``A = U₁ᵀU₂`` and ``B = V₂ᵀV₁``. With P = U₁ᵀT = Σ₁V₁ᵀ and
Q = U₂ᵀS = Σ₂V₂ᵀ the first is ``n · A · QPᵀ · Σ₁⁻¹`` and the second ``Aᵀ · PQᵀ · Σ₂⁻¹``: what is
needed of a matrix is its leading left singular vectors and their products with it, no full
decomposition. n scales the first block only, hence interference = a·n + b.

Source: EnchTable (arXiv 2511.09880), interference-aware merging.
"""

from __future__ import annotations

import math

import torch

from enchtable_vllm.vector.factors import Factors


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
    overlap = task.left.mT @ safety.left  # A, [k1, k2]
    cross = safety.right @ task.right.mT  # Σ₂ B Σ₁, [k2, k1]
    first = overlap @ (cross / task.sigma)  # A Σ₂ B
    second = overlap.mT @ (cross.mT / safety.sigma)  # Aᵀ Σ₁ Bᵀ
    normalizer = 200.0 / (task.rank + safety.rank) ** 2
    # The power-of-two prescaling is undone here, exactly.
    a = math.ldexp(_entrywise_l1(first), safety.exponent)
    b = math.ldexp(_entrywise_l1(second), task.exponent)
    return normalizer * a, normalizer * b


def _entrywise_l1(matrix: torch.Tensor) -> float:
    """‖matrix‖₁, summed in fp64."""
    return float(torch.linalg.vector_norm(matrix, 1, dtype=torch.float64))
