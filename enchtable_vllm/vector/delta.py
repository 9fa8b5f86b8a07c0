"""One tensor of a safety vector, as it is stored: floats, or int8 with a scale for every 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from enchtable_kernels import SCALE_BLOCK, dequantize, scales_per_row

_LARGEST = 127


@dataclass(frozen=True)
class Delta:
    """Values that need no unpacking: the addition reads them as they are.

    Attributes:
        values: ``[..., n]`` bf16/fp32, or int8 with ``scales``.
        scales: ``[..., ceil(n / 64)]`` fp32, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def quantized(cls, dense: torch.Tensor) -> Delta:
        """Int8: each block of 64 along the last axis is scaled to its largest magnitude.

        Args:
            dense: ``[..., n]`` fp32, finite.
        """
        rows = dense.reshape(-1, dense.shape[-1] if dense.ndim else 1)
        blocks = scales_per_row(rows.shape[1])
        padded = torch.nn.functional.pad(rows, (0, blocks * SCALE_BLOCK - rows.shape[1]))
        blocked = padded.view(rows.shape[0], blocks, SCALE_BLOCK)
        scales = blocked.abs().amax(dim=-1) / _LARGEST
        # Where a scale is zero (or a block so small that it rounds to zero) so are the values.
        steps = torch.where(scales > 0, scales, 1.0)[..., None]
        values = (blocked / steps).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        values = values.view(padded.shape)[:, : rows.shape[1]]
        return cls(values.reshape(dense.shape).contiguous(), scales.view(*dense.shape[:-1], blocks))

    def float(self) -> torch.Tensor:
        """The delta itself: ``[..., n]`` fp32."""
        return dequantize(self.values, self.scales)

    def to(self, device: torch.device) -> Delta:
        """The same on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return Delta(self.values.to(device), scales)
