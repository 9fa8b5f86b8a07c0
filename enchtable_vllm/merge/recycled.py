"""Memory for tensors, used again when they are gone."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch


class Recycled:
    """Makes tensors in memory that came back from others.

    Memory that is new to a process costs more than what is done with it here: the system makes
    and zeroes it page by page when it is first written to. The allocator gives back what is
    freed, or keeps it where the next tensor of the same size does not fit.

    What was handed out is free when its last view is gone, whoever holds it, in whatever thread.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, its values whatever they are."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory[:]  # an object of its own: the tensor's storage holds it as long as it lives
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
