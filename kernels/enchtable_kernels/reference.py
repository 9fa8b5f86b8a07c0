"""The definition, in plain torch: whole tensors, no chunks, any device."""

from __future__ import annotations

import torch


def unpack_keep(keep_bits: torch.Tensor, count: int) -> torch.Tensor:
    """Bits to booleans; bit ``i % 8`` of byte ``i // 8`` belongs to element ``i``.

    Args:
        keep_bits: ``[ceil(count / 8)]`` uint8.
        count: How many elements.

    Returns:
        ``[count]`` bool.
    """
    shifts = torch.arange(8, device=keep_bits.device, dtype=torch.uint8)
    return ((keep_bits[:, None] >> shifts) & 1).flatten()[:count].bool()


def fused_add_reference(
    stored: torch.Tensor,
    delta: torch.Tensor,
    coefficient: float,
    out: torch.Tensor,
    keep_bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package docstring. All tensors flat and of one length.

    Returns:
        ``[4]`` float64: intended_sq, added_sq, overlap, non_finite.
    """
    c = torch.tensor(coefficient, dtype=torch.float32, device=stored.device)
    product = delta.float() * c
    if keep_bits is not None:
        keep = unpack_keep(keep_bits, stored.numel())
        product = torch.where(keep, product, torch.zeros_like(product))
    before = stored.float()
    merged = (before + product).to(stored.dtype)
    if keep_bits is not None:
        merged = torch.where(keep, merged, stored)
    out.copy_(merged)
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
