"""How many warps of a kernel a multiprocessor of NVIDIA's can hold, of those it has room for.

Computed as the CUDA toolkit's own ``cuda_occupancy.h`` does, from what the compiler says.
"""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; those of
# 8.0, 9.0 and 10.0 differ in shared memory alone.
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Source: cuda_occupancy.h: cudaOccRegAllocationGranularity, cudaOccSubPartitionsPerMultiprocessor,
# cudaOccSMemAllocationGranularity; and what the runtime reserves in each block's shared memory.
_REGISTERS_AT_ONCE, _PARTITIONS, _SHARED_AT_ONCE, _SHARED_RESERVED = 256, 4, 128, 1024


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        warps: Of a block.
        registers: Of a thread.
        shared_bytes: Of a block.
    """

    warps: int
    registers: int
    shared_bytes: int


def occupancy(usage: Usage, capability: int) -> float | None:
    """Warps that are on a multiprocessor at once, as a share of the most that there can be.

    Args:
        usage: Of the kernel.
        capability: 90 is compute capability 9.0.

    Returns:
        None of a capability whose limits are not written down here.
    """
    if capability not in _SHARED_BYTES:
        return None
    of_a_warp = _up(usage.registers * _WARP, _REGISTERS_AT_ONCE)
    by_registers = _REGISTERS // _PARTITIONS // of_a_warp * _PARTITIONS // usage.warps
    of_a_block = _up(usage.shared_bytes + _SHARED_RESERVED, _SHARED_AT_ONCE)
    by_shared = _SHARED_BYTES[capability] // of_a_block
    blocks = min(by_registers, by_shared, _WARPS // usage.warps, _BLOCKS)
    return blocks * usage.warps / _WARPS


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
