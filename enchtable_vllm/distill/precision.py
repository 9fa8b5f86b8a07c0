"""Whether a machine computes in bf16 without paying for it.

A CPU without AVX-512 has no instructions for it, and takes eight times as long as for fp32 (AMD
EPYC 7003).
"""

from __future__ import annotations

import functools
import time

import torch

_ROWS, _INPUTS, _OUTPUTS = 128, 576, 1536
_TIMES = 5


@functools.cache
def computes_bf16() -> bool:
    """Try a matrix product of a small model's size in both; bf16 may take twice as long."""
    if torch.cuda.is_available():
        return True
    return _seconds(torch.bfloat16) < 2 * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of several times."""
    left = torch.ones(_ROWS, _INPUTS, dtype=dtype)
    right = torch.ones(_OUTPUTS, _INPUTS, dtype=dtype)
    taken = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        taken.append(time.perf_counter() - started)
    return min(taken)
