"""Work on tensors side by side: a thread for each, and one thread within each.

Eigenvectors scale badly over threads and well over matrices. And with one thread a matrix, a
result does not depend on how many cores there are or what OMP_NUM_THREADS says.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

# A CPU worker of vLLM puts a stand-in that does nothing in the place of `torch.set_num_threads`.
from torch._C import set_num_threads

from enchtable_vllm.errors import ConfigError

_MOST = 8  # each holds a few tensors
Result = TypeVar("Result")


def worker_count(jobs: int | None, device: str) -> int:
    """How many tensors at once.

    Args:
        jobs: What the user chose; None: one for each core that this process may use, at most
            eight, and one alone on a GPU.
        device: Where the linear algebra runs.

    Raises:
        ConfigError: Fewer than one.
    """
    if jobs is None:
        return 1 if device != "cpu" else min(len(os.sched_getaffinity(0)), _MOST)
    if jobs < 1:
        raise ConfigError("jobs", expected="at least 1", got=jobs, fix="Leave it out.")
    return jobs


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute in full fp32, each on one core, and on the caller's GPU.

    An engine may have allowed TF32, which the accuracy bounds do not cover. And to a new thread
    ``cuda`` is the first GPU, whichever its process works on.
    """
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch is untyped here
    gpu = torch.cuda.current_device() if begun else None
    pool = ThreadPoolExecutor(jobs, "enchtable", _begin, (gpu,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # Each worker's own setting is also the default of threads that are born later.
        set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _begin(gpu: int | None) -> None:
    set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(gpu)


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[str], Result], names: Iterable[str], ahead: int
) -> Iterator[tuple[str, Result]]:
    """Each name with its result, in order; never more than ``ahead`` results wait."""
    waiting: deque[tuple[str, Future[Result]]] = deque()
    for name in names:
        waiting.append((name, pool.submit(work, name)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for name, future in waiting:
        yield name, future.result()
