"""L2 norms, which are also the cheapest proof that a tensor is finite."""

from __future__ import annotations

import math

import torch

from enchtable_vllm.errors import NonFiniteError


def finite_norm(tensor: torch.Tensor, what: str) -> float:
    """‖tensor‖₂, summed in fp64.

    Args:
        tensor: Any shape, floating point.
        what: How an error message calls it.

    Raises:
        NonFiniteError: It holds NaN or infinity.
    """
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if not math.isfinite(norm):
        raise NonFiniteError(
            what,
            expected="finite values",
            got="NaN or infinity",
            fix="A checkpoint is damaged or its training diverged: fetch or train it again.",
        )
    return norm
