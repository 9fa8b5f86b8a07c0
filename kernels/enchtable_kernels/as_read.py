"""`fused_add` on the CPU of tensors that are still in files.

Reading a tensor whole, hashing it and adding it sends its bytes three times through memory, and
into pages that the system must first make and zero, which costs more than all three. Here they
go piece by piece through memory that stays in a core's caches; only the result is ever whole.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from enchtable_kernels._addition import scales_per_row

#: Called with an element's index and memory for what is stored and for the delta from there on.
Read = Callable[[int, memoryview, memoryview], None]

#: Elements of a piece: of 16 bits, both sides and the result take 3 MiB. Smaller ones fit the
#: second-level cache, and cost more than they save: threads wait for Python's lock between any two.
PIECE = 2**19

_local = threading.local()


def fused_add_as_read(
    read: Read,
    delta_dtype: torch.dtype,
    coefficients: Sequence[float],
    out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    rounding_key: int | None = None,
) -> torch.Tensor:
    """The same bits as `fused_add`, of what is read meanwhile.

    Args:
        read: Fills both memories; called for one piece after the other, in order, each once.
        delta_dtype: bf16, fp16, fp32 or int8.
        coefficients: One, or one for each slice along the first of several axes.
        out: ``[..., n]``, not empty, contiguous, on the CPU; of the shape and dtype of what is
            stored. Receives the result.
        scales: As for `fused_add`, as are the others.
        keep_bits: Packed.
        rounding_key: 64 bits.

    Returns:
        ``[4]`` float64, for `Effect.from_tensor`: statistics, as those of `fused_add`.
    """
    # Late, as every import of numba: vLLM 0.32 does not start where it came first.
    from enchtable_kernels import cpu

    length = out.shape[-1] if out.ndim else 1
    rows = out.numel() // length // len(coefficients)
    at_once = max(1, PIECE // length)
    blocks = cpu.BLOCK // math.gcd(cpu.BLOCK, length)  # rows that are whole blocks
    at_once = min(rows, at_once // blocks * blocks or at_once)
    stored, delta = _memory(at_once * length * 4)
    target = cpu.patterns(out.view(-1))
    row_scales = scales_per_row(length)
    flat_scales = cpu.NO_SCALES if scales is None else scales.contiguous().view(-1).numpy()
    kind = cpu.KINDS[out.dtype]
    sums = np.zeros(4)
    for i, coefficient in enumerate(coefficients):
        for row in range(i * rows, (i + 1) * rows, at_once):
            count = min(at_once, (i + 1) * rows - row) * length
            first = row * length
            from_file = stored[: count * out.itemsize], delta[: count * delta_dtype.itemsize]
            read(first, *from_file)
            cpu.add_blocks(
                np.frombuffer(from_file[0], target.dtype),
                kind,
                np.frombuffer(from_file[1], cpu.PATTERNS[delta_dtype.itemsize]),
                cpu.KINDS[delta_dtype],
                target[first : first + count],
                np.float32(coefficient),
                flat_scales[row * row_scales :],
                length,
                row_scales,
                cpu.NO_BITS if keep_bits is None else keep_bits.numpy(),
                rounding_key is not None and out.dtype == torch.bfloat16,
                np.uint64(rounding_key or 0),
                first,
                True,
                0,
                count,
                sums,
            )
    return torch.from_numpy(sums)


def _memory(size: int) -> tuple[memoryview, memoryview]:
    """This thread's own, for a piece of either side."""
    held: tuple[memoryview, memoryview] | None = getattr(_local, "memory", None)
    if held is None or len(held[0]) < size:
        held = _local.memory = memoryview(bytearray(size)), memoryview(bytearray(size))
    return held
