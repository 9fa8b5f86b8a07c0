"""The definition, in plain torch: whole tensors, no chunks, any device."""

from __future__ import annotations

import torch

from enchtable_kernels._addition import SCALE_BLOCK, Addition

_U32 = 0xFFFFFFFF


def unpack_keep(keep_bits: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Bits to booleans; bit ``i % 8`` of byte ``i // 8`` belongs to element ``i``.

    Args:
        keep_bits: ``[...]`` uint8.
        first: The first element wanted.
        count: How many elements.

    Returns:
        ``[count]`` bool.
    """
    shifts = torch.arange(8, device=keep_bits.device, dtype=torch.uint8)
    begin, end = first // 8, (first + count + 7) // 8
    bits = ((keep_bits[begin:end, None] >> shifts) & 1).flatten()
    return bits[first % 8 : first % 8 + count].bool()


def dequantize(delta: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """A delta's values: ``int8 · scale``, an fp32 multiply; floats are only widened.

    Args:
        delta: ``[..., n]`` int8 with scales, or bf16/fp16/fp32 without.
        scales: ``[..., ceil(n / 64)]`` fp32, or None.

    Returns:
        ``[..., n]`` fp32.
    """
    values = delta.float()
    if scales is None:
        return values
    row_length = delta.shape[-1] if delta.ndim else 1
    spread = scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., :row_length]
    return values * spread.reshape(values.shape)


def noise(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """16 random bits for each element: a pure function of the key and the element's index.

    Two rounds of the integer hash ``lowbias32`` (Wellons), over the index's low half and the
    key's, then its high half and the key's.

    Returns:
        ``[count]`` int64, in 0 … 65535.
    """
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    x = _lowbias32((index ^ (key & _U32)) & _U32)
    return _lowbias32(x ^ (((index >> 32) ^ (key >> 32)) & _U32)) >> 16


def _lowbias32(x: torch.Tensor) -> torch.Tensor:
    # int64 holds uint32; products wrap modulo 2^64, which leaves the low half right.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _U32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def round_stochastic(total: torch.Tensor, key: int, first: int) -> torch.Tensor:
    """Fp32 to bf16, up or down with the chance that makes the mean exact.

    Args:
        total: ``[count]`` fp32.
        key: Chooses the noise.
        first: The index of element 0.
    """
    bits = total.view(torch.int32).long() & _U32
    bits = (bits + noise(key, first, total.numel(), total.device)) >> 16
    rounded = bits.to(torch.uint16).view(torch.bfloat16)
    return torch.where(torch.isnan(total), total.bfloat16(), rounded)


def fused_add_reference(addition: Addition) -> torch.Tensor:
    """See the package docstring.

    Returns:
        ``[4]`` float64: intended_sq, added_sq, overlap, non_finite.
    """
    stored, count = addition.stored, addition.stored.numel()
    delta, scales = addition.delta, addition.scales
    if scales is not None:
        rows = delta.view(-1, addition.row_length)
        delta = dequantize(rows, scales.view(rows.shape[0], -1)).flatten()
    c = torch.tensor(addition.coefficient, dtype=torch.float32, device=stored.device)
    product = delta.float() * c
    if addition.keep_bits is not None:
        keep = unpack_keep(addition.keep_bits, addition.first, count)
        product = torch.where(keep, product, torch.zeros_like(product))
    before = stored.float()
    total = before + product
    if addition.rounding_key is not None and stored.dtype == torch.bfloat16:
        merged = round_stochastic(total, addition.rounding_key, addition.first)
    else:
        merged = total.to(stored.dtype)
    if addition.keep_bits is not None:
        merged = torch.where(keep, merged, stored)
    addition.out.copy_(merged)
    intended = product.double()
    added = merged.float().sub_(before).double()
    return torch.stack(
        (
            intended.dot(intended),
            added.dot(added),
            added.dot(intended),
            (~torch.isfinite(merged)).sum().double(),
        )
    )
