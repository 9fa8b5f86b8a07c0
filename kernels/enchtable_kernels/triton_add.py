"""The GPU path: one Triton kernel, one pass over memory.

Bytes: with 16-bit tensors 6 an element (two read, one written), and the sums add 16 bytes
per block of 2048. Whole blocks run without bounds, so that loads and stores are 128 bits
wide whatever the length; only the last block masks.

Rounding to bf16 is done on the integer bits (add 0x7fff plus the lowest kept bit, drop 16
bits): the same code then runs on every target, and under Triton's interpreter, whose own
fp32→bf16 cast truncates (seen on 3.9). It costs four integer operations an element, which
hide behind the memory traffic. fp32→fp16 rounds to nearest even on every target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _round_like(value, out_ptr):
    """Round fp32 to the dtype that ``out_ptr`` points at, to nearest even."""
    if out_ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + (0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 (Triton: both branches of a compile-time choice must be branches)
        return value.to(out_ptr.dtype.element_ty)


@triton.jit
def _add_block(
    stored_ptr,
    delta_ptr,
    out_ptr,
    keep_ptr,
    sums_ptr,
    coefficient,
    keep_start,
    count,
    pid,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # 64-bit offsets: tensors may hold more than 2^31 elements.
    offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BOUNDED:
        inside = offsets < count
        stored = tl.load(stored_ptr + offsets, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + offsets, mask=inside, other=0.0)
    else:
        stored = tl.load(stored_ptr + offsets)
        delta = tl.load(delta_ptr + offsets)
    before = stored.to(tl.float32)
    product = delta.to(tl.float32) * coefficient
    if HAS_KEEP:
        bit = offsets + keep_start
        if BOUNDED:
            packed = tl.load(keep_ptr + bit // 8, mask=inside, other=0)
        else:
            packed = tl.load(keep_ptr + bit // 8)
        keep = ((packed.to(tl.int32) >> (bit % 8).to(tl.int32)) & 1) != 0
        product = tl.where(keep, product, 0.0)
    total = before + product
    merged = _round_like(total, out_ptr)
    if HAS_KEEP:
        merged = tl.where(keep, merged, stored)
        total = tl.where(keep, total, before)
    if BOUNDED:
        tl.store(out_ptr + offsets, merged, mask=inside)
    else:
        tl.store(out_ptr + offsets, merged)
    after = merged.to(tl.float32)
    added = after - before
    # x - x is 0 for every finite x and NaN else; `total` catches a NaN that rounding would hide.
    bad = ((after - after) != 0.0) | ((total - total) != 0.0)
    row = sums_ptr + pid * 4
    tl.store(row, tl.sum(product * product))
    tl.store(row + 1, tl.sum(added * added))
    tl.store(row + 2, tl.sum(added * product))
    tl.store(row + 3, tl.sum(bad.to(tl.float32)))


@triton.jit
def fused_add_kernel(
    stored_ptr,
    delta_ptr,
    out_ptr,
    keep_ptr,
    sums_ptr,
    coefficient,
    keep_start,
    count,
    HAS_KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds one block and stores its four sums at ``sums_ptr[4 · program]``."""
    pid = tl.program_id(0)
    if (pid.to(tl.int64) + 1) * BLOCK <= count:
        _add_block(
            stored_ptr,
            delta_ptr,
            out_ptr,
            keep_ptr,
            sums_ptr,
            coefficient,
            keep_start,
            count,
            pid,
            HAS_KEEP,
            BLOCK,
            BOUNDED=False,
        )
    else:
        _add_block(
            stored_ptr,
            delta_ptr,
            out_ptr,
            keep_ptr,
            sums_ptr,
            coefficient,
            keep_start,
            count,
            pid,
            HAS_KEEP,
            BLOCK,
            BOUNDED=True,
        )


def fused_add_triton(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficient: float,
    out: torch.Tensor,
    keep_bits: torch.Tensor | None = None,
    keep_start: int = 0,
) -> torch.Tensor:
    """See the package docstring. All tensors flat, contiguous, on one GPU (or interpreted).

    Args:
        stored: ``[count]``, bf16/fp16/fp32.
        delta: Likewise.
        out: Likewise, of stored's dtype.
        coefficient: Rounded to fp32.
        keep_bits: Packed uint8, or None.
        keep_start: The bit that belongs to element 0.

    Returns:
        ``[4]`` float64 on the same device: intended_sq, added_sq, overlap, non_finite.
        Nothing waits for the device.
    """
    count = stored.numel()
    blocks = triton.cdiv(count, BLOCK)
    sums = torch.empty((blocks, 4), dtype=torch.float32, device=stored.device)
    fused_add_kernel[(blocks,)](
        stored,
        delta,
        out,
        keep_bits if keep_bits is not None else stored,
        sums,
        coefficient,
        keep_start,
        count,
        HAS_KEEP=keep_bits is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return sums.sum(dim=0, dtype=torch.float64)
