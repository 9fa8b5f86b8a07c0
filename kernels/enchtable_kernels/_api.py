"""The one entry point: checks, layout, and the path for the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from enchtable_kernels.cpu import fused_add_cpu
from enchtable_kernels.reference import fused_add_reference, unpack_keep

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_add(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficients: Sequence[float],
    *,
    keep_bits: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``stored + coefficient · delta`` in one pass; bit-identical on every path.

    Args:
        stored: ``[...]`` bf16/fp16/fp32, on the CPU or a GPU.
        delta: Same shape and device, bf16/fp16/fp32.
        coefficients: One number for the whole tensor, or one for each slice along the first
            axis (a stack of experts).
        keep_bits: ``[ceil(numel / 8)]`` uint8, same device; a 0 bit leaves its element as
            stored. Bit ``i % 8`` of byte ``i // 8`` belongs to element ``i``.
        out: Where to write; same shape and dtype as ``stored``, contiguous. May be
            ``stored`` itself. New by default.

    Returns:
        ``(out, sums)``; ``sums`` is a float64 ``[4]`` tensor for `Effect.from_tensor`, left on
        the device so that nothing waits for it.

    Raises:
        ValueError: Shapes, dtypes, devices or counts that do not fit together.
    """
    _check(stored, delta, coefficients, keep_bits, out)
    stored, delta = stored.contiguous(), delta.contiguous()
    if out is None:
        out = torch.empty_like(stored)
    flat = stored.view(-1), delta.view(-1), out.view(-1)
    per_slice = stored.numel() // len(coefficients)
    sums = torch.zeros(4, dtype=torch.float64, device=stored.device)
    if per_slice == 0:
        return out, sums
    for i, coefficient in enumerate(coefficients):
        begin = i * per_slice
        parts = [tensor[begin : begin + per_slice] for tensor in flat]
        sums += _dispatch(parts, coefficient, keep_bits, begin)
    return out, sums


def _dispatch(
    parts: list[torch.Tensor], coefficient: float, keep_bits: torch.Tensor | None, begin: int
) -> torch.Tensor:
    stored, delta, out = parts
    if stored.device.type == "cuda":  # ROCm too
        from enchtable_kernels.triton_add import fused_add_triton

        with torch.cuda.device(stored.device):
            return fused_add_triton(stored, delta, coefficient, out, keep_bits, begin)
    if keep_bits is not None and begin % 8:
        # The chunked path reads whole bytes; realign the few masks that start inside one.
        keep = unpack_keep(keep_bits, begin + stored.numel())[begin:]
        keep_bits = pack_keep(keep)
    elif keep_bits is not None:
        keep_bits = keep_bits[begin // 8 :]
    path = fused_add_cpu if stored.device.type == "cpu" else fused_add_reference
    return path(stored, delta, coefficient, out, keep_bits)


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
    keep_bits: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    for name, tensor in (("stored", stored), ("delta", delta)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected bf16, fp16 or fp32, got {tensor.dtype}")
    if delta.shape != stored.shape:
        raise ValueError(f"delta: expected shape {tuple(stored.shape)}, got {tuple(delta.shape)}")
    if delta.device != stored.device:
        raise ValueError(f"delta: expected device {stored.device}, got {delta.device}")
    stack = stored.shape[0] if stored.ndim else 1
    if len(coefficients) != 1 and len(coefficients) != stack:
        raise ValueError(f"coefficients: expected 1 or {stack}, got {len(coefficients)}")
    if keep_bits is not None:
        expected = (stored.numel() + 7) // 8
        if keep_bits.dtype != torch.uint8 or keep_bits.numel() != expected:
            raise ValueError(
                f"keep_bits: expected {expected} uint8, got {keep_bits.numel()} {keep_bits.dtype}"
            )
    if out is not None and (
        out.shape != stored.shape or out.dtype != stored.dtype or not out.is_contiguous()
    ):
        raise ValueError("out: expected a contiguous tensor of stored's shape and dtype")
