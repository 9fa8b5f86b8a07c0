"""The one entry point: checks, layout, and the path for the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from enchtable_kernels._addition import Addition, scales_per_row
from enchtable_kernels.reference import fused_add_reference

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_add(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficients: Sequence[float],
    *,
    scales: torch.Tensor | None = None,
    keep_bits: torch.Tensor | None = None,
    rounding_key: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``stored + coefficient · delta`` in one pass; bit-identical on every path.

    Args:
        stored: ``[..., n]`` bf16/fp16/fp32, on the CPU or a GPU.
        delta: Same shape and device, bf16/fp16/fp32, or int8 with ``scales``.
        coefficients: One number for the whole tensor, or one for each slice along the first
            of several axes (a stack of experts).
        scales: ``[..., ceil(n / 64)]`` fp32: one for each 64 elements of delta's last axis.
        keep_bits: ``[ceil(numel / 8)]`` uint8, same device; a 0 bit leaves its element as
            stored. Bit ``i % 8`` of byte ``i // 8`` belongs to element ``i``.
        rounding_key: Round bf16 stochastically, with noise that is a pure function of this
            64-bit key and the element's index. None, and other dtypes: to nearest even.
        out: Where to write; same shape and dtype as ``stored``, contiguous. May be ``stored``
            or ``delta`` itself. New by default.

    Returns:
        ``(out, sums)``; ``sums`` is a float64 ``[4]`` tensor for `Effect.from_tensor`, left on
        the device so that nothing waits for it.

    Raises:
        ValueError: Shapes, dtypes, devices or counts that do not fit together.
    """
    _check(stored, delta, coefficients, scales, keep_bits, rounding_key, out)
    if out is None:
        out = torch.empty_like(stored, memory_format=torch.contiguous_format)
    sums = torch.zeros(4, dtype=torch.float64, device=stored.device)
    if stored.numel() == 0:
        return out, sums
    flat_stored, flat_delta, flat_out = (
        tensor.contiguous().view(-1) for tensor in (stored, delta, out)
    )
    flat_scales = None if scales is None else scales.contiguous().view(-1)
    slices = len(coefficients)
    size = stored.numel() // slices
    for i, coefficient in enumerate(coefficients):
        part = slice(i * size, (i + 1) * size)
        sums += _dispatch(
            Addition(
                flat_stored[part],
                flat_delta[part],
                flat_out[part],
                coefficient,
                scales=None if flat_scales is None else flat_scales.chunk(slices)[i],
                row_length=stored.shape[-1] if stored.ndim else 1,
                keep_bits=keep_bits,
                rounding_key=rounding_key,
                first=i * size,
            )
        )
    return out, sums


def _dispatch(addition: Addition) -> torch.Tensor:
    device = addition.stored.device
    if device.type == "cuda":  # ROCm too
        from enchtable_kernels.triton_add import fused_add_triton

        with torch.cuda.device(device):
            return fused_add_triton(addition)
    if device.type == "cpu":
        from enchtable_kernels.cpu import fused_add_cpu

        return fused_add_cpu(addition)
    return fused_add_reference(addition)


def pack_keep(keep: torch.Tensor) -> torch.Tensor:
    """Booleans to bits: the inverse of `reference.unpack_keep`.

    Args:
        keep: Any shape, bool.

    Returns:
        ``[ceil(numel / 8)]`` uint8.
    """
    flat = keep.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, device=keep.device, dtype=torch.uint8)
    return (padded << shifts).sum(dim=1, dtype=torch.uint8)


def _check(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficients: Sequence[float],
    scales: torch.Tensor | None,
    keep_bits: torch.Tensor | None,
    rounding_key: int | None,
    out: torch.Tensor | None,
) -> None:
    if stored.dtype not in FLOAT_DTYPES:
        raise ValueError(f"stored: expected bf16, fp16 or fp32, got {stored.dtype}")
    kinds = FLOAT_DTYPES if scales is None else (torch.int8,)
    if delta.dtype not in kinds:
        wanted = "bf16, fp16 or fp32" if scales is None else "int8, because it has scales"
        raise ValueError(f"delta: expected {wanted}, got {delta.dtype}")
    if delta.shape != stored.shape:
        raise ValueError(f"delta: expected shape {tuple(stored.shape)}, got {tuple(delta.shape)}")
    for name, tensor in (("delta", delta), ("scales", scales), ("keep_bits", keep_bits)):
        if tensor is not None and tensor.device != stored.device:
            raise ValueError(f"{name}: expected device {stored.device}, got {tensor.device}")
    stack = stored.shape[0] if stored.ndim > 1 else 1
    if len(coefficients) != 1 and len(coefficients) != stack:
        raise ValueError(f"coefficients: expected 1 or {stack}, got {len(coefficients)}")
    if scales is not None:
        rows = stored.shape if stored.ndim else (1,)
        expected = (*rows[:-1], scales_per_row(rows[-1]))
        if scales.dtype != torch.float32 or tuple(scales.shape) != expected:
            raise ValueError(
                f"scales: expected fp32 {expected}, got {scales.dtype} {tuple(scales.shape)}"
            )
    if keep_bits is not None:
        count = (stored.numel() + 7) // 8
        if keep_bits.dtype != torch.uint8 or keep_bits.shape != (count,):
            raise ValueError(
                f"keep_bits: expected {count} uint8, got {tuple(keep_bits.shape)} {keep_bits.dtype}"
            )
    if rounding_key is not None and not 0 <= rounding_key < 2**64:
        raise ValueError(f"rounding_key: expected 64 bits, got {rounding_key}")
    if out is not None and (
        out.shape != stored.shape or out.dtype != stored.dtype or not out.is_contiguous()
    ):
        raise ValueError("out: expected a contiguous tensor of stored's shape and dtype")
