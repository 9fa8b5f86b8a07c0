"""The GPU path: one Triton kernel, one pass over memory.

Bytes: with 16-bit tensors 6 an element (two read, one written), with an int8 delta 5.06; the
sums add 16 bytes per block of 2048. Whole blocks run without bounds, so that loads and stores
are 128 bits wide whatever the length; only the last block masks. A block is a tile of 128 × 16:
the elements of a row share a scale and two or three bytes of keep-bits, which are loaded once
a row and not once an element.

Rounding to bf16 is done on the integer bits (add 0x7fff plus the lowest kept bit, drop 16
bits): the same code then runs on every target, and under Triton's interpreter, whose own
fp32→bf16 cast truncates (seen on 3.9). It costs four integer operations an element, which
hide behind the memory traffic; stochastic rounding costs about twenty more. fp32→fp16 rounds
to nearest even on every target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enchtable_kernels._addition import SCALE_BLOCK, Addition, scales_per_row

BLOCK = 2048

#: How a block finds its scales: there are none; element ``i`` has scale ``i // 64``, because
#: rows are whole blocks; or rows end inside a block.
NO_SCALES, WHOLE_SCALES, RAGGED_SCALES = range(3)


def compiler_options(amd: bool, scales: int) -> dict[str, int | bool]:
    """What the compiler is told.

    So many warps that a thread has 16 elements: 128 bits even of an int8 delta. No fused
    multiply-add, which rounds once. On NVIDIA's, registers for four blocks on a multiprocessor:
    left alone, some compilers take more than they need. Rows that end inside a block of scales
    need more.
    """
    options: dict[str, int | bool] = {"num_warps": 2 if amd else 4, "enable_fp_fusion": False}
    return options if amd or scales == RAGGED_SCALES else {**options, "maxnreg": 128}


@triton.jit
def _widen(value):
    """Any dtype to fp32, exactly. Bits for bf16: the interpreter's own cast loses subnormals."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 (Triton: both branches of a compile-time choice must be branches)
        return value.to(tl.float32)


@triton.jit
def _lowbias32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(begin, within, key_low, key_high):
    """See `reference.noise`, of index ``begin + within``: its halves, for want of registers."""
    low = begin.to(tl.uint32) + within.to(tl.uint32)
    high = (begin >> 32).to(tl.uint32) + (low < within.to(tl.uint32)).to(tl.uint32)
    x = _lowbias32(low ^ key_low.to(tl.uint32, bitcast=True))
    return _lowbias32(x ^ high ^ key_high.to(tl.uint32, bitcast=True)) >> 16


@triton.jit
def _round_like(value, out_ptr, begin, within, key_low, key_high, STOCHASTIC: tl.constexpr):
    """Round fp32 to the dtype that ``out_ptr`` points at, to nearest even or stochastically."""
    if out_ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            bits = bits + _noise(begin, within, key_low, key_high)
        else:
            bits = bits + (0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 (as above)
        return value.to(out_ptr.dtype.element_ty)


@triton.jit
def _load(pointers, inside, BOUNDED: tl.constexpr):
    if BOUNDED:
        return tl.load(pointers, mask=inside, other=0)
    else:  # noqa: RET505 (as above)
        return tl.load(pointers)


@triton.jit
def _add_block(
    stored_ptr,
    delta_ptr,
    out_ptr,
    scales_ptr,
    keep_ptr,
    sums_ptr,
    coefficient,
    row_length,
    row_scales,
    key_low,
    key_high,
    first,
    count,
    pid,
    SCALES: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # 64-bit offsets: tensors may hold more than 2^31 elements.
    start = pid.to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK // 16)
    within = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    offsets = start + within
    inside = offsets < count
    # Scales first: divisions branch on AMD's, and a load before them was seen torn into bytes.
    if SCALES == 1:  # WHOLE_SCALES
        at = start // 64 + rows // 4
        scales = _load(scales_ptr + at, start + rows * 16 < count, BOUNDED)[:, None]
    if SCALES == 2:  # RAGGED_SCALES
        at = offsets // row_length * row_scales + offsets % row_length // 64
        scales = _load(scales_ptr + at, inside, BOUNDED)
    stored = _load(stored_ptr + offsets, inside, BOUNDED)
    delta = _load(delta_ptr + offsets, inside, BOUNDED)
    before = _widen(stored)
    product = _widen(delta)
    if SCALES != 0:  # NO_SCALES
        product = product * scales
    product = product * coefficient
    begin = start + first
    if HAS_KEEP:
        # The 16 bits of a row lie in two bytes, or three where they do not begin with one.
        bit = (begin % 8).to(tl.int32)
        bytes_ptr = keep_ptr + begin // 8 + rows * 2
        left = tl.minimum(count - start, BLOCK).to(tl.int32) + bit - rows * 16
        packed = tl.load(bytes_ptr, mask=left > 0, other=0).to(tl.int32)
        packed |= tl.load(bytes_ptr + 1, mask=left > 8, other=0).to(tl.int32) << 8
        packed |= tl.load(bytes_ptr + 2, mask=left > 16, other=0).to(tl.int32) << 16
        keep = ((packed[:, None] >> (bit + tl.arange(0, 16))[None, :]) & 1) != 0
        # Bits of -0, to which older compilers give no constant of its own: x - 0 is x, -0 too.
        kept = tl.where(keep, product.to(tl.uint32, bitcast=True), 0x80000000)
        product = kept.to(tl.float32, bitcast=True)
    total = before + product
    merged = _round_like(total, out_ptr, begin, within, key_low, key_high, STOCHASTIC)
    if BOUNDED:
        tl.store(out_ptr + offsets, merged, mask=inside)
    else:
        tl.store(out_ptr + offsets, merged)
    after = _widen(merged)
    added = after - before
    # x - x is 0 for every finite x and NaN else; `total` catches a NaN that rounding would hide.
    bad = ((after - after) != 0.0) | ((total - total) != 0.0)
    row = sums_ptr + pid * 4
    tl.store(row, tl.sum(product * product))
    tl.store(row + 1, tl.sum(added * added))
    tl.store(row + 2, tl.sum(added * product))
    tl.store(row + 3, tl.sum(bad.to(tl.float32)))


# Nothing but dtypes and alignment makes another variant: a model has tensors of many sizes, and
# each variant would be compiled while it loads.
@triton.jit(do_not_specialize=["row_length", "row_scales", "key_low", "key_high", "first", "count"])
def fused_add_kernel(
    stored_ptr,
    delta_ptr,
    out_ptr,
    scales_ptr,
    keep_ptr,
    sums_ptr,
    coefficient,
    row_length,
    row_scales,
    key_low,
    key_high,
    first,
    count,
    SCALES: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds one block and stores its four sums at ``sums_ptr[4 · program]``."""
    pid = tl.program_id(0)
    if (pid.to(tl.int64) + 1) * BLOCK <= count:
        _add_block(
            stored_ptr,
            delta_ptr,
            out_ptr,
            scales_ptr,
            keep_ptr,
            sums_ptr,
            coefficient,
            row_length,
            row_scales,
            key_low,
            key_high,
            first,
            count,
            pid,
            SCALES,
            HAS_KEEP,
            STOCHASTIC,
            BLOCK,
            BOUNDED=False,
        )
    else:
        _add_block(
            stored_ptr,
            delta_ptr,
            out_ptr,
            scales_ptr,
            keep_ptr,
            sums_ptr,
            coefficient,
            row_length,
            row_scales,
            key_low,
            key_high,
            first,
            count,
            pid,
            SCALES,
            HAS_KEEP,
            STOCHASTIC,
            BLOCK,
            BOUNDED=True,
        )


def fused_add_triton(addition: Addition) -> torch.Tensor:
    """See the package docstring; on one GPU, or interpreted.

    Returns:
        ``[4]`` float64 on the same device: intended_sq, added_sq, overlap, non_finite.
        Nothing waits for the device.
    """
    stored, scales, keep_bits = addition.stored, addition.scales, addition.keep_bits
    count, key = stored.numel(), addition.rounding_key
    blocks = triton.cdiv(count, BLOCK)
    sums = torch.empty((blocks, 4), dtype=torch.float32, device=stored.device)
    if scales is None:
        found_by = NO_SCALES
    elif addition.row_length % SCALE_BLOCK == 0:
        found_by = WHOLE_SCALES
    else:
        found_by = RAGGED_SCALES
    fused_add_kernel[(blocks,)](
        stored,
        addition.delta,
        addition.out,
        stored if scales is None else scales,
        stored if keep_bits is None else keep_bits,
        sums,
        addition.coefficient,
        addition.row_length,
        scales_per_row(addition.row_length),
        _signed((key or 0) & 0xFFFFFFFF),
        _signed((key or 0) >> 32),
        addition.first,
        count,
        SCALES=found_by,
        HAS_KEEP=keep_bits is not None,
        STOCHASTIC=key is not None and stored.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        **compiler_options(torch.version.hip is not None, found_by),
    )
    return sums.sum(dim=0, dtype=torch.float64)


def _signed(half: int) -> int:
    """32 bits as the signed number that Triton takes for an argument of one type, i32."""
    return half - 2**32 if half >= 2**31 else half
