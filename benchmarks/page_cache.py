"""Files out of the page cache: what is loaded next comes from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.harness import NotVerified

#: Of the bytes, what may stay without a word.
_MOST_RESIDENT = 0.02


def evict(folders: Iterable[Path]) -> None:
    """Drop the files of some folders from the page cache.

    Raises:
        NotVerified: They stay: what is measured then is not cold.
    """
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not on the disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total = sum(path.stat().st_size for path in files)
    share = sum(map(resident_bytes, files)) / total
    if share > _MOST_RESIDENT:
        raise NotVerified(
            "page cache",
            expected="none of the files",
            got=f"{share:.0%} of their bytes",
            fix="Let TMPDIR be on a disk, not in memory.",
        )


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache, by mincore(2)."""
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            address, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        del view  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    resident = int((pages & 1).sum())
    return min(size, resident * mmap.PAGESIZE)
