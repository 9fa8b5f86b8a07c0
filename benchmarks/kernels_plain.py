"""The fused addition as one would write it in torch: what it is held against on a GPU.

The same sum and the same statistics of it, those in fp32. A mask is taken unpacked, a byte an
element: torch has no packed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from enchtable_kernels import dequantize, unpack_keep
from enchtable_kernels._addition import Addition
from enchtable_kernels.reference import round_stochastic


@dataclass(frozen=True)
class Arguments:
    """Of `plain`, laid out as it likes them best.

    Attributes:
        stored: ``[rows, columns]``.
        delta: Likewise.
        scales: ``[rows, blocks, 1]`` where rows are whole blocks, else ``[rows, blocks]``, or None.
        keep: ``[rows, columns]`` bool, or None.
        coefficient: Of the delta.
        key: Of stochastic rounding, or None.
    """

    stored: torch.Tensor
    delta: torch.Tensor
    scales: torch.Tensor | None
    keep: torch.Tensor | None
    coefficient: float
    key: int | None

    @classmethod
    def of(cls, addition: Addition) -> Arguments:
        """An addition's."""
        count = addition.stored.numel()
        columns = addition.row_length if addition.scales is not None else count
        scales, keep = addition.scales, addition.keep_bits
        if scales is not None:
            scales = scales.view(count // columns, -1)
            scales = scales if columns % 64 else scales[..., None]
        return cls(
            addition.stored.view(-1, columns),
            addition.delta.view(-1, columns),
            scales,
            None if keep is None else unpack_keep(keep, 0, count).view(-1, columns),
            addition.coefficient,
            addition.rounding_key,
        )

    def tuple(self) -> tuple[Any, ...]:
        """For a compiler that knows no dataclasses of ours."""
        return self.stored, self.delta, self.scales, self.keep, self.coefficient, self.key


def plain(
    stored: torch.Tensor,
    delta: torch.Tensor,
    scales: torch.Tensor | None,
    keep: torch.Tensor | None,
    coefficient: float,
    key: int | None,
) -> tuple[torch.Tensor, ...]:
    """See `Arguments`.

    Returns:
        The merged weights, then intended_sq, added_sq, overlap and non_finite.
    """
    if scales is None:
        product = delta.float()
    elif scales.ndim == 3:
        blocks = delta.float().view(scales.shape[0], scales.shape[1], -1)
        product = (blocks * scales).view(delta.shape)
    else:
        product = dequantize(delta, scales)
    product = product * coefficient
    if keep is not None:
        product = torch.where(keep, product, 0.0)
    before = stored.float()
    total = before + product
    if key is None:
        merged = total.to(stored.dtype)
    else:
        merged = round_stochastic(total.view(-1), key, 0).view(total.shape)
    if keep is not None:
        merged = torch.where(keep, merged, stored)
    added = merged.float() - before
    bad = ~torch.isfinite(merged)
    return merged, (product**2).sum(), (added**2).sum(), (added * product).sum(), bad.sum()
