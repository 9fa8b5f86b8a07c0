"""The CPU path: one compiled loop over blocks that stay in the first-level cache.

numba, which vLLM itself depends on, compiles it on first use (a second or two) and keeps the
result on disk. Written block by block in plain loops over 32-bit patterns, because that is
what LLVM turns into full-width vector code; nothing is fused or reordered except the sums.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit

from enchtable_kernels._addition import SCALE_BLOCK, Addition, scales_per_row

BLOCK = 2048
#: Below this many elements a thread costs more than it gives.
_LEAST_PER_THREAD = 2**19
_BF16, _F16, _F32, _INT8 = range(4)
KINDS = {torch.bfloat16: _BF16, torch.float16: _F16, torch.float32: _F32, torch.int8: _INT8}
#: Bytes of an element → numpy's type of its bit patterns: numpy has no bf16.
PATTERNS = {1: np.int8, 2: np.uint16, 4: np.uint32}
NO_BITS = np.empty(0, np.uint8)
NO_SCALES = np.empty(0, np.float32)


def _compiled(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **flags)(function)
        except RuntimeError:  # no folder to keep it in, such as a read-only system without a home
            return njit(nogil=True, **flags)(function)

    return decorate


def fused_add_cpu(addition: Addition) -> torch.Tensor:
    """See the package docstring.

    Returns:
        ``[4]`` float64: intended_sq, added_sq, overlap, non_finite.
    """
    count = addition.stored.numel()
    threads = max(1, min(torch.get_num_threads(), count // _LEAST_PER_THREAD))
    blocks = -(-count // BLOCK)
    edges = [min(count, blocks * i // threads * BLOCK) for i in range(threads + 1)]
    sums = np.zeros((threads, 4))
    key = addition.rounding_key
    stochastic = key is not None and addition.stored.dtype == torch.bfloat16
    add = functools.partial(
        add_blocks,
        patterns(addition.stored),
        KINDS[addition.stored.dtype],
        patterns(addition.delta),
        KINDS[addition.delta.dtype],
        patterns(addition.out),
        np.float32(addition.coefficient),
        NO_SCALES if addition.scales is None else addition.scales.numpy(),
        addition.row_length,
        scales_per_row(addition.row_length),
        NO_BITS if addition.keep_bits is None else addition.keep_bits.numpy(),
        stochastic,
        np.uint64(key or 0),
        addition.first,
        addition.out.data_ptr() not in (addition.stored.data_ptr(), addition.delta.data_ptr()),
    )
    others = [
        _pool(os.getpid()).submit(add, edges[i], edges[i + 1], sums[i]) for i in range(1, threads)
    ]
    add(edges[0], edges[1], sums[0])
    for other in others:
        other.result()
    return torch.from_numpy(sums.sum(axis=0))


@functools.cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Of this process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="enchtable-add")


def patterns(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bit patterns, in its own memory."""
    return tensor.detach().view(torch.uint8).numpy().view(PATTERNS[tensor.element_size()])


@_compiled()
def add_blocks(
    stored: Any,
    stored_kind: int,
    delta: Any,
    delta_kind: int,
    out: Any,
    coefficient: float,
    scales: Any,
    row_length: int,
    row_scales: int,
    keep_bits: Any,
    stochastic: bool,
    key: int,
    first: int,
    apart: bool,
    start: int,
    stop: int,
    sums: Any,
) -> None:
    """Elements ``start`` to ``stop``; ``sums`` receives the four sums.

    ``apart``: ``out`` is memory of its own. Where it is ``stored`` or ``delta``, LLVM makes no
    vector code of a loop that both reads and writes it.
    """
    before_bits = np.empty(BLOCK, np.uint32)
    product_bits = np.empty(BLOCK, np.uint32)
    after_bits = np.empty(BLOCK, np.uint32)
    before = before_bits.view(np.float32)
    product = product_bits.view(np.float32)
    after = after_bits.view(np.float32)
    keep = np.empty(BLOCK, np.bool_)
    plain = apart and stored_kind == _BF16 and not stochastic and not keep_bits.size
    for at in range(start, stop, BLOCK):
        n = min(BLOCK, stop - at)
        if plain and delta_kind == _BF16:
            _add_bf16(stored[at : at + n], delta[at : at + n], 16, coefficient, out[at:], sums)
            continue
        _widen(delta[at : at + n], delta_kind, product_bits, product)
        if scales.size:
            _scale(product, n, at, scales, row_length, row_scales)
        if plain:
            _add_bf16(stored[at : at + n], product_bits, 0, coefficient, out[at:], sums)
            continue
        _widen(stored[at : at + n], stored_kind, before_bits, before)
        for i in range(n):
            product[i] = product[i] * coefficient
        if keep_bits.size:
            for i in range(n):
                bit = first + at + i
                keep[i] = (keep_bits[bit >> 3] >> (bit & 7)) & 1
                if not keep[i]:
                    product[i] = np.float32(0)
        for i in range(n):
            after[i] = before[i] + product[i]
        if stochastic:
            _add_noise(after_bits, n, key, first + at)
        _round(after_bits, after, n, stored_kind, stochastic)
        if keep_bits.size:
            for i in range(n):  # x + 0 is x, but for -0 + 0 = +0: what is left out keeps every bit
                if not keep[i]:
                    after_bits[i] = before_bits[i]
        _narrow(after_bits, n, stored_kind, out[at : at + n])
        _sum(before, product, after, n, sums)


@_compiled(fastmath={"reassoc"})  # for the sums alone: whole numbers stand between all else
def _add_bf16(stored: Any, delta: Any, shift: int, coefficient: float, out: Any, sums: Any) -> None:
    """What is nearly always merged, bf16 rounded to nearest, in one loop instead of seven.

    The same bits as the steps below: `_widen`, the addition, `_round`, `_narrow`, `_sum`.
    """
    half, sixteen, left = np.uint32(0x7FFF), np.uint32(16), np.uint32(shift)
    intended_sq = added_sq = overlap = np.float32(0)
    for i in range(stored.size):
        before = np.uint32(np.uint32(stored[i]) << sixteen).view(np.float32)
        intended = np.uint32(np.uint32(delta[i]) << left).view(np.float32) * coefficient
        exact = np.float32(before + intended).view(np.uint32)
        rounded = np.uint32(exact + half + ((exact >> sixteen) & np.uint32(1)))
        if exact & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            rounded = np.uint32(0x7FC00000)
        out[i] = np.uint16(rounded >> sixteen)
        added = np.float32(np.uint32(rounded & np.uint32(0xFFFF0000)).view(np.float32) - before)
        intended_sq += np.float32(intended * intended)
        added_sq += np.float32(added * added)
        overlap += np.float32(added * intended)
    sums[0] += intended_sq
    sums[1] += added_sq
    sums[2] += overlap
    if not np.isfinite(added_sq):  # counted only where there may be something to count
        bad = 0
        for i in range(stored.size):
            bad += (out[i] & np.uint16(0x7F80)) == np.uint16(0x7F80)
        sums[3] += bad


@_compiled()
def _widen(source: Any, kind: int, bits: Any, values: Any) -> None:
    """Any dtype to fp32, exactly."""
    n = source.size
    if kind == _BF16:
        for i in range(n):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
    elif kind == _F16:
        for i in range(n):
            magnitude = np.uint32(source[i]) & np.uint32(0x7FFF)
            bits[i] = magnitude << np.uint32(13)
        for i in range(n):  # the exponent's bias, 127 - 15; subnormals come out right too
            values[i] = values[i] * np.float32(2.0**112)
        for i in range(n):
            half = np.uint32(source[i])
            if (half & np.uint32(0x7C00)) == np.uint32(0x7C00):
                bits[i] |= np.uint32(0x7F800000)
            bits[i] |= (half & np.uint32(0x8000)) << np.uint32(16)
    elif kind == _F32:
        for i in range(n):
            bits[i] = np.uint32(source[i])
    else:
        for i in range(n):
            values[i] = np.float32(source[i])


@_compiled()
def _scale(values: Any, n: int, at: int, scales: Any, row_length: int, row_scales: int) -> None:
    """Multiply each run of elements that share a scale by it."""
    row, column = at // row_length, at % row_length
    i = 0
    while i < n:
        run = min(n - i, row_length - column, SCALE_BLOCK - column % SCALE_BLOCK)
        scale = scales[row * row_scales + column // SCALE_BLOCK]
        part = values[i : i + run]
        if run == SCALE_BLOCK:  # a length that the compiler knows
            for j in range(SCALE_BLOCK):
                part[j] = part[j] * scale
        else:
            for j in range(run):
                part[j] = part[j] * scale
        i += run
        column += run
        if column == row_length:
            row, column = row + 1, 0


@_compiled()
def _add_noise(bits: Any, n: int, key: int, first: int) -> None:
    """See `reference.noise`."""
    low_key, high_key = np.uint32(key), np.uint32(key >> np.uint64(32))
    for i in range(n):
        index = np.uint64(first + i)
        x = np.uint32(index) ^ low_key
        x ^= x >> np.uint32(16)
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x ^= x >> np.uint32(15)
        x = np.uint32(x * np.uint32(0x846CA68B))
        x ^= x >> np.uint32(16)
        x ^= np.uint32(index >> np.uint64(32)) ^ high_key
        x ^= x >> np.uint32(16)
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x ^= x >> np.uint32(15)
        x = np.uint32(x * np.uint32(0x846CA68B))
        x ^= x >> np.uint32(16)
        if bits[i] & np.uint32(0x7FFFFFFF) < np.uint32(0x7F800000):
            bits[i] = np.uint32(bits[i] + (x >> np.uint32(16)))


@_compiled()
def _round(bits: Any, values: Any, n: int, kind: int, truncate: bool) -> None:
    """Round fp32 to the values that the stored dtype has, to nearest even; still as fp32."""
    if kind == _BF16:
        for i in range(n):
            if bits[i] & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                bits[i] = np.uint32(0x7FC00000)  # a NaN, which a carry could turn into a number
        if not truncate:
            for i in range(n):
                odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                bits[i] = np.uint32(bits[i] + np.uint32(0x7FFF) + odd)
        for i in range(n):
            bits[i] &= np.uint32(0xFFFF0000)
    elif kind == _F16:
        for i in range(n):
            sign = bits[i] & np.uint32(0x80000000)
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            if magnitude < np.uint32(0x38800000):  # below 2^-14 halves are 2^-24 apart: so are
                bits[i] = magnitude  #               fp32 numbers next to 0.5
                rounded = values[i] + np.float32(0.5)
                values[i] = rounded - np.float32(0.5)
                bits[i] |= sign
            elif magnitude < np.uint32(0x7F800000):
                odd = (magnitude >> np.uint32(13)) & np.uint32(1)
                magnitude = np.uint32(magnitude + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
                if magnitude >= np.uint32(0x47800000):  # 65536 and more
                    magnitude = np.uint32(0x7F800000)
                bits[i] = magnitude | sign


@_compiled()
def _narrow(bits: Any, n: int, kind: int, out: Any) -> None:
    """Store fp32 patterns that the stored dtype holds exactly."""
    if kind == _BF16:
        for i in range(n):
            out[i] = bits[i] >> np.uint32(16)
    elif kind == _F32:
        for i in range(n):
            out[i] = bits[i]
    else:
        for i in range(n):
            sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            if magnitude >= np.uint32(0x7F800000):
                quiet = np.uint32(0x200) if magnitude > np.uint32(0x7F800000) else np.uint32(0)
                half = np.uint32(0x7C00) | quiet
            elif magnitude >= np.uint32(0x38800000):
                half = (magnitude - np.uint32(0x38000000)) >> np.uint32(13)
            else:
                # A multiple of 2^-24 below 2^-14: its mantissa, with the hidden bit, moved down.
                exponent = magnitude >> np.uint32(23)
                mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
                shift = np.uint32(126) - exponent
                half = mantissa >> shift if exponent > np.uint32(0) else np.uint32(0)
            out[i] = half | sign


@_compiled(fastmath={"reassoc"})  # for these sums alone: they are statistics
def _sum(before: Any, product: Any, after: Any, n: int, sums: Any) -> None:
    intended_sq = added_sq = overlap = poison = np.float32(0)
    for i in range(n):
        added = after[i] - before[i]
        intended_sq += product[i] * product[i]
        added_sq += added * added
        overlap += added * product[i]
        poison += after[i] * np.float32(0)  # 0 for every finite number, else NaN
    sums[0] += intended_sq
    sums[1] += added_sq
    sums[2] += overlap
    if poison != poison:  # counted only where there is something to count: it is slower
        bad = 0
        for i in range(n):
            bad += after[i] - after[i] != np.float32(0)
        sums[3] += bad
