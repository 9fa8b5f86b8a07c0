"""Memory had beforehand: there when it is written to, and what it held still in it."""

import mmap
import platform
import resource
from pathlib import Path

import pytest
import torch

from enchtable_vllm.merge import populate

MIB = 2**20
KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def new_to_the_process(size: int) -> torch.Tensor:
    """[size] uint8 in memory straight from the system: an allocator may have some that was used."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.mark.skipif(KERNEL < (5, 14), reason="Linux cannot be asked before 5.14")
def test_what_was_had_beforehand_is_not_waited_for():
    nobody_asked, asked = (new_to_the_process(64 * MIB) for _ in range(2))
    populate([asked])
    before = faults()
    asked.fill_(1)
    between = faults()
    nobody_asked.fill_(1)
    assert between - before < 100, "the system was still asked for memory"
    assert faults() - between >= 64 * MIB // (2 * MIB)  # of large pages; of small ones 512 times


def test_no_memory_is_taken_besides():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    tensors = [new_to_the_process(3 * MIB + 4321) for _ in range(20)]
    before = resident()
    populate(tensors)
    assert resident() - before <= sum(t.nbytes for t in tensors) + 4 * MIB


def test_what_tensors_hold_stays_as_it_is():
    large = torch.arange(6 * MIB, dtype=torch.int32)
    small = [torch.full((n,), float(n)) for n in (0, 1, 1000, 70_000)]
    populate([large, large[5:], large.view(2, -1).T, *small])
    assert torch.equal(large, torch.arange(6 * MIB, dtype=torch.int32))
    assert all(torch.equal(one, torch.full((one.numel(),), float(one.numel()))) for one in small)


def test_tensors_elsewhere_are_passed_over():
    populate([torch.empty(8 * MIB, device="meta")])
    populate([])


def test_a_system_without_large_pages_does_what_it_does_anyway(monkeypatch):
    monkeypatch.delattr("mmap.MADV_HUGEPAGE")
    populate([torch.empty(8 * MIB)])
