"""What merging costs a core, step by step: no loading on the CPU takes less.

A tensor that is merged while it is read is read from both files, its delta is hashed, and both are
added, piece by piece in memory that stays in a core's caches. Each step is timed by a process that
does nothing else: alone, and then as many of them at once as there are cores, because two cores
are not always twice one: a cloud's are often two threads of the same.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

from benchmarks.architectures import LLAMA_1B, SMOLLM2_135M
from benchmarks.harness import Row, row
from benchmarks.harness.results import NotMeasured, Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown

STEPS = ("read both", "hash the delta", "add")
_ALONE, _OP, _SHAPE = "one core", "step", "2^20 elements, bf16 + bf16"
_PIECE = 2**19  # of elements
_OF = 2**20
_PIECES = 64  # of the file, 64 MiB: more than a core's caches
_BF16 = 2
_PATIENCE_SECONDS = 300

_gate: Barrier


def steps(scratch: Path, rounds: int) -> Iterator[Row]:
    """Seconds of 2^20 elements, of each step: by one core alone, and by each of all at once."""
    file = scratch / "pieces"
    file.write_bytes(os.urandom(_PIECES * _PIECE * _BF16))
    cores = len(os.sched_getaffinity(0))
    for count, provider in ((1, _ALONE), (cores, f"each of {cores}")):
        context = get_context("spawn")
        gate = context.Barrier(count)
        with ProcessPoolExecutor(count, context, initializer=_enter, initargs=(gate,)) as pool:
            for step in STEPS:
                done = [pool.submit(_timed, step, file, rounds) for _ in range(count)]
                seconds = [max(each) for each in zip(*(one.result() for one in done), strict=True)]
                yield row(_OP, provider, _SHAPE, "bf16", seconds, metric=step)


def _enter(gate: Barrier) -> None:
    global _gate
    _gate = gate


def _timed(step: str, file: Path, rounds: int) -> list[float]:
    """In a process of its own, and together with the others."""
    work = _work(step, file)
    for index in range(_PIECES):  # into the page cache, and the compiled loop out of its own
        work(index)
    found = []
    for _ in range(rounds):
        _gate.wait(_PATIENCE_SECONDS)
        began = time.perf_counter()
        for index in range(_PIECES):
            work(index)
        found.append((time.perf_counter() - began) * _OF / (_PIECES * _PIECE))
    return found


def _work(step: str, file: Path) -> Callable[[int], object]:
    import numpy as np
    from blake3 import blake3

    from enchtable_kernels import cpu

    size = _PIECE * _BF16
    # Whole pages. The C library's large memory begins 16 bytes after a page, where reading what
    # begins a page is a third as fast on AMD's Zen 3; tensors in files begin anywhere.
    stored, delta = (memoryview(mmap.mmap(-1, size)) for _ in range(2))
    if step == "read both":
        descriptor = os.open(file, os.O_RDONLY)  # closed with the process

        def read(index: int) -> None:
            for memory, at in ((stored, index), (delta, (index + _PIECES // 2) % _PIECES)):
                os.preadv(descriptor, [memory], at * size)

        return read
    if step == "hash the delta":
        hasher = blake3()
        return lambda _: hasher.update(delta)
    both = [np.frombuffer(memory, np.uint16) for memory in (stored, delta)]
    out, sums = np.empty(_PIECE, np.uint16), np.zeros(4)
    return lambda _: cpu.add_blocks(
        both[0], 0, both[1], 0, out, np.float32(0.9), cpu.NO_SCALES, _PIECE, 1, cpu.NO_BITS, False,
        np.uint64(0), 0, True, 0, _PIECE, sums,
    )  # fmt: skip


def shared_out(results: Results) -> tuple[float, list[Row]]:
    """Seconds of all steps for a byte of a bf16 delta, shared out to all cores; from which rows.

    Raises:
        NotMeasured: There are none.
    """
    rows = [row for row in _published(results) if row.provider != _ALONE]
    cores = int(rows[0].provider.split()[-1])
    return sum(row.p50 for row in rows) / cores / (_OF * _BF16), rows


def table(results: Results) -> Table:
    """The steps, their sum, and what that is for the attention of the models that are loaded."""
    rows = _published(results)
    providers = list(dict.fromkeys(row.provider for row in rows))
    seconds = {(row.provider, row.metric): row.p50 for row in rows}
    sums = {name: sum(seconds[name, step] for step in STEPS) for name in providers}
    lines = [[step, *(shown(seconds[name, step], "s") for name in providers)] for step in STEPS]
    lines.append(["all three", *(shown(sums[name], "s") for name in providers)])
    for model in (SMOLLM2_135M, LLAMA_1B):
        each = model.attention_parameters / _OF
        cells = [
            shown(each * sums[name] / (1 if name == _ALONE else int(name.split()[-1])), "s")
            for name in providers
        ]
        lines.append([f"attention of {model.name}, {each:,.1f} times that, shared out", *cells])
    return Table(["2^20 elements, bf16 + bf16", *providers], lines, rows)


def _published(results: Results) -> list[Row]:
    rows = [row for row in results.published("kernels") if row.op == _OP]
    if not rows:
        wanted = "rows of 'python -m benchmarks run kernels'"
        raise NotMeasured("results", expected=wanted, got="none", fix="Run it.")
    return rows
