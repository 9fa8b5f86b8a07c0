"""What an addition did: intended against achieved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Effect:
    """Sums over one tensor, or over many added up.

    16-bit storage keeps a small update only in part; these sums tell how much of it.

    Attributes:
        intended_sq: ‖c·S‖², of what should have been added.
        added_sq: ‖merged − W‖², of what was added.
        overlap: ⟨merged − W, c·S⟩.
        non_finite: How many merged elements are NaN or infinite.
    """

    intended_sq: float = 0.0
    added_sq: float = 0.0
    overlap: float = 0.0
    non_finite: int = 0

    @classmethod
    def from_tensor(cls, sums: torch.Tensor) -> Effect:
        """From a 4-element tensor in the order of the attributes (waits for its device)."""
        intended_sq, added_sq, overlap, non_finite = sums.double().cpu().tolist()
        return cls(intended_sq, added_sq, overlap, int(non_finite))

    def __add__(self, other: Effect) -> Effect:
        return Effect(
            self.intended_sq + other.intended_sq,
            self.added_sq + other.added_sq,
            self.overlap + other.overlap,
            self.non_finite + other.non_finite,
        )

    @property
    def retained_share(self) -> float:
        """⟨merged − W, c·S⟩ / ‖c·S‖²: 1 when everything survived rounding, 0 when nothing did."""
        return self.overlap / self.intended_sq if self.intended_sq > 0 else 1.0

    @property
    def cosine(self) -> float:
        """Between what was added and what should have been; 0 when nothing was added."""
        product = math.sqrt(self.intended_sq) * math.sqrt(self.added_sq)
        if product > 0:
            return self.overlap / product
        return 1.0 if self.intended_sq == self.added_sq else 0.0

    @property
    def relative_error(self) -> float:
        """‖(merged − W) − c·S‖ / ‖c·S‖."""
        if self.intended_sq <= 0:
            return 0.0
        error_sq = self.added_sq - 2 * self.overlap + self.intended_sq
        return math.sqrt(max(0.0, error_sq) / self.intended_sq)
