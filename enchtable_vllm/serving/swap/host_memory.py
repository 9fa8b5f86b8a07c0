"""The host memory that a swap takes: how much it may be, and where it comes from."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from enchtable_vllm.errors import MemoryBoundError

_GIB = 2**30
#: Of what is free: the rest is for the page cache, which staging reads through, and for others.
_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")
#: A control group's limit, what it uses, and the file pages among that, which can be had back:
#: also the active ones, as `MemAvailable` counts. Shards that several ranks read are active.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_Names = tuple[str, str, tuple[str, str]]


def free_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = _CGROUP,
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Host memory that is free for this process: the machine's, or its container's if less.

    Args:
        meminfo: What the machine has.
        cgroup: Where control groups are, of either version.
        own: Which of them this process is in; within a container it may be their root.
    """
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for folder, names in _groups(cgroup, own):
        with suppress(OSError, ValueError, LookupError):  # none, or no limit ("max")
            free = min(free, _free_within(folder, *names))
    return max(free, 0)


def _groups(cgroup: Path, own: Path) -> Iterator[tuple[Path, _Names]]:
    """The process's control groups and those around them, each of which may have a limit."""
    yield cgroup, _V2
    yield cgroup / "memory", _V1
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, names = (cgroup / "memory", _V1) if controllers else (cgroup, _V2)
            inner = Path(path.lstrip("/"))
            for part in (inner, *inner.parents):
                yield top / part, names


def _free_within(folder: Path, limit: str, usage: str, pages: tuple[str, str]) -> int:
    most, used = (int((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return most - used + sum(int(stat.get(name, 0)) for name in pages)


def refuse_too_much(needed_bytes: int, ranks: int, staging_gib: float | None) -> None:
    """Refuse to stage what would not fit.

    Args:
        needed_bytes: Of one rank: old and new tensors together.
        ranks: How many of them share this machine.
        staging_gib: The bound that the server's config sets on all of them, if it does.

    Raises:
        MemoryBoundError: It is more than that, or than half of what is free.
    """
    most = free_bytes() * _SHARE if staging_gib is None else staging_gib * _GIB
    if needed_bytes * ranks > most:
        each = "" if ranks == 1 else f" ({ranks} ranks of {needed_bytes / _GIB:.2f})"
        raise MemoryBoundError(
            "host memory for old and new tensors",
            expected=f"at most {most / _GIB:.2f} GiB: "
            + ("half of what is free" if staging_gib is None else "'staging_gib'"),
            got=f"{needed_bytes * ranks / _GIB:.2f} GiB{each}",
            fix="Free memory, raise 'staging_gib' in --model-loader-extra-config, use a vector of "
            "a narrower scope, or restart the server with the new vector.",
        )


class HostPages:
    """Memory for many tensors, straight from the system and given back to it as a whole.

    The C library would keep what is freed: hundreds of megabytes in pieces, between which a
    server's own allocations come to lie.

    Args:
        nbytes: For all tensors together, each of `size_of` its bytes.
    """

    _ALIGNMENT = 64

    def __init__(self, nbytes: int) -> None:
        pages = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        # Unmapped when the last tensor that lies in it is gone.
        self._free = torch.frombuffer(pages, dtype=torch.uint8)

    @classmethod
    def size_of(cls, nbytes: int) -> int:
        """What a tensor of so many bytes takes."""
        return -(-nbytes // cls._ALIGNMENT) * cls._ALIGNMENT

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, in here."""
        place, size = self._free[: tensor.nbytes], self.size_of(tensor.nbytes)
        self._free = self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
