"""Memory that is about to be filled, had from the system beforehand and in large pages."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from enchtable_vllm.merge.cores import use_every_core

#: Of <linux/mman.h>, which Python does not name; from Linux 5.14 on.
_POPULATE_WRITE = 23
#: The size of a large page; what is smaller has none.
_LARGE = 2**21
#: What a thread asks for at once.
_PIECE = 64 * 2**20


def populate(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors on the CPU the memory that they will be written to, by all of torch's threads.

    Memory that is new to a process is made and zeroed when it is first written to, 4 KiB at a
    time, and that takes several times as long as copying into it. In pages of 2 MiB it takes a
    third. What a tensor holds stays as it is, and no more memory is taken than the tensors have.

    A system that knows no such pages, or has none left, does what it would have done anyway.
    Tensors of less than 2 MiB stay in small pages: the allocator's notes between them are
    written already, and what would put such pages together (MADV_COLLAPSE) waits for every core.

    Args:
        tensors: Each is to be written to, all of it; those elsewhere are passed over.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if madvise is None or advice is None:  # not Linux
        return

    def ask(first: int, end: int, what: int) -> None:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), what)

    spans = [(first, end) for first, end in _spans(tensors) if end - first >= _LARGE]
    for span in spans:
        ask(span[0], span[1], advice)
    pieces = [
        (first, min(first + _PIECE, end))
        for begin, end in spans
        for first in range(begin, end, _PIECE)
    ]
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=use_every_core) as pool:
        list(pool.map(lambda piece: ask(piece[0], piece[1], _POPULATE_WRITE), pieces))


def _spans(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Whole pages that tensors lie in, (first address, end), neighbours joined."""
    page = mmap.PAGESIZE
    spans: list[tuple[int, int]] = []
    storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.nbytes)
    for first, size in sorted((s.data_ptr(), s.nbytes()) for s in storages):
        begin, end = first // page * page, -(-(first + size) // page) * page
        if spans and begin <= spans[-1][1]:
            begin, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((begin, end))
    return spans
