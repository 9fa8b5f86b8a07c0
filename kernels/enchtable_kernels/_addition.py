"""What one addition works on, checked and flat: the same object for every path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Elements along the last axis that share one scale of an int8 delta.
SCALE_BLOCK = 64


@dataclass(frozen=True)
class Addition:
    """A whole tensor, or one slice of a stack. All tensors contiguous and on one device.

    Attributes:
        stored: ``[count]``, bf16/fp16/fp32.
        delta: ``[count]``, bf16/fp16/fp32, or int8 with ``scales``.
        out: ``[count]``, of stored's dtype; may be ``stored`` or ``delta``.
        coefficient: Rounded to fp32 before use.
        scales: ``[count / row_length · ceil(row_length / 64)]`` fp32, or None.
        row_length: Of the last axis; blocks of a scale do not cross its end.
        keep_bits: Packed uint8 of the whole tensor, or None.
        rounding_key: 64 bits that choose the noise of stochastic rounding to bf16; None rounds
            to nearest.
        first: The whole tensor's index of element 0: where its keep-bits and noise begin.
    """

    stored: torch.Tensor
    delta: torch.Tensor
    out: torch.Tensor
    coefficient: float
    scales: torch.Tensor | None = None
    row_length: int = 1
    keep_bits: torch.Tensor | None = None
    rounding_key: int | None = None
    first: int = 0


def scales_per_row(row_length: int) -> int:
    """How many scales a row of an int8 delta has; the last block may be shorter."""
    return -(-row_length // SCALE_BLOCK)
