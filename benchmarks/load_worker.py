"""Loading, inside a worker of a real vLLM: what its rank sees.

vLLM's worker imports this module by name when it is told to call a function of it.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import NotVerified
from benchmarks.page_cache import evict
from enchtable_vllm.checkpoint import Location
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.vector import SafetyVector

AUTO, MERGED = "auto", "merge to disk, then auto"
_READINGS = ("weights", "model", "peak")
#: Of those that are timed: many times as long as all others together, and never close.
_MERGES = 2
#: Of <linux/mman.h>, which Python does not name.
_MADV_NOHUGEPAGE = 15
Found = dict[tuple[str, str, int], dict[str, list[float]]]


@dataclass(frozen=True)
class Case:
    """A task model and its vectors, as they are stored.

    Attributes:
        name: Of the model.
        task: Its folder.
        vectors: bf16 or int8 → (vector, plan).
        scratch: For merges.
    """

    name: str
    task: Path
    vectors: Mapping[str, tuple[Path, Path]]
    scratch: Path

    def extra(self, stored: str) -> dict[str, str]:
        """The loader's extra config."""
        vector, plan = self.vectors[stored]
        return {"safety_vector": str(vector), "merge_plan": str(plan)}

    def merge(self, stored: str) -> Path:
        """The offline merge, made anew."""
        target = self.scratch / "merged"
        shutil.rmtree(target, ignore_errors=True)
        vector, plan = self.vectors[stored]
        merge_checkpoint(
            Location(self.task),
            SafetyVector(Location(vector)),
            resolve_plan(*read_plan(plan)),
            target,
        )
        return target

    def providers(self) -> list[str]:
        """Whose time is taken."""
        return [AUTO, *(f"enchtable {stored}" for stored in self.vectors), MERGED]


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        rounds: How often, by state of the page cache: warm or cold.
        threads: How many torch may use, one after the other.
        whole: Whether free memory is left in large pieces before each load, or in pages of 4 KiB.
    """

    rounds: Mapping[str, int]
    threads: tuple[int, ...]
    whole: bool = True


def run_in_vllm(case: Case, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with the worker of a real vLLM that serves the task model."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    llm = LLM(
        model=str(case.task),
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        distributed_executor_backend="uni",
    )
    return llm.collective_rpc(call, args=(case, *arguments))[0]


def verify_bits(worker: Any, case: Case) -> None:
    """What is loaded equals, bit for bit, what plain vLLM loads of the offline merge.

    What plain vLLM loads of the task model is loaded, too: all that is timed has been done once.

    Raises:
        NotVerified: It does not.
    """
    _weights(worker, *_loader(worker, case.task, None))
    for stored in case.vectors:
        served = _weights(worker, *_loader(worker, case.task, case.extra(stored)))
        expected = dict(
            _weights(worker, *_loader(worker, case.merge(stored), None)).named_parameters()
        )
        wrong = [n for n, one in served.named_parameters() if not torch.equal(one, expected[n])]
        if wrong:
            raise NotVerified(
                f"{case.name}, loaded with an {stored} vector",
                expected="the offline merge's bits",
                got=f"others in {len(wrong)} tensors, first '{wrong[0]}'",
                fix="No speed is reported.",
            )


def measure_loads(worker: Any, case: Case, plan: Plan) -> Found:
    """Readings of each provider, cache and number of threads, interleaved.

    Raises:
        NotVerified: What is loaded is wrong.
    """
    verify_bits(worker, case)  # and warms caches, allocators and the compiled loop
    found: Found = {}
    before = torch.get_num_threads()
    for threads in plan.threads:
        torch.set_num_threads(threads)
        for cache, rounds in plan.rounds.items():
            for round_ in range(rounds):
                for provider in rotated(case.providers(), round_):
                    if provider == MERGED and round_ >= _MERGES:
                        continue
                    if cache == "cold":
                        evict([case.task, *(path for path, _ in case.vectors.values())])
                    readings = _readings(worker, case, provider, plan.whole)
                    kept = found.setdefault(
                        (provider, cache, threads), {name: [] for name in _READINGS}
                    )
                    for name in _READINGS:
                        kept[name].append(readings[name])
    torch.set_num_threads(before)
    return found


def rotated(providers: Sequence[str], number: int) -> list[str]:
    """Another first in each round: whoever comes after a load finds the machine as that left it."""
    first = number % len(providers)
    return [*providers[first:], *providers[:first]]


def _readings(worker: Any, case: Case, provider: str, whole: bool) -> dict[str, float]:
    if provider == AUTO:
        return _load(worker, *_loader(worker, case.task, None), whole)
    if provider != MERGED:
        extra = case.extra(provider.removeprefix("enchtable "))
        return _load(worker, *_loader(worker, case.task, extra), whole)
    with _peak_of_anonymous_memory() as peak:
        started = time.perf_counter()
        merged = case.merge(next(iter(case.vectors)))
        seconds = time.perf_counter() - started
    loaded = _load(worker, *_loader(worker, merged, None), whole)
    os.sync()  # what was written is not to be the next one's trouble
    return {
        "weights": seconds + loaded["weights"],
        "model": seconds + loaded["model"],
        "peak": max(peak[0], loaded["peak"]),
    }


def _loader(worker: Any, model: Path, extra: dict[str, str] | None) -> tuple[Any, Any]:
    """A loader and the config of what it loads."""
    from vllm.model_executor.model_loader import get_model_loader

    load_config = dataclasses.replace(
        worker.vllm_config.load_config,
        load_format="auto" if extra is None else "enchtable",
        model_loader_extra_config=extra or {},
        use_tqdm_on_load=False,
    )
    model_config = copy.copy(worker.vllm_config.model_config)
    model_config.model = str(model)
    return get_model_loader(load_config), model_config


@contextmanager
def _configured(worker: Any, needed_bytes: int, whole: bool = True) -> Iterator[Any]:
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Layers register by name, and refuse to do so twice.
    worker.vllm_config.compilation_config.static_forward_context.clear()
    gc.collect()
    _forget_memory()
    _have_memory(needed_bytes, whole)
    with set_current_vllm_config(worker.vllm_config), set_default_torch_dtype(torch.bfloat16):
        yield worker.vllm_config


def _forget_memory() -> None:
    """Leave the next load no memory that is cheaper than a new process has."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what glibc keeps for later would hide in the next peak, too
    if "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0":
            first, end = (int(address, 16) for address in span.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_NOHUGEPAGE)


def _have_memory(nbytes: int, whole: bool) -> None:
    """Have the machine itself have as much: a virtual one gives what is free back to its host.

    (Free page reporting.) Whoever writes to such memory first waits for the host, ten times as
    long as for the machine's own system.
    """
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE if whole else _MADV_NOHUGEPAGE)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)  # unmapped with the tensor


def _needed_bytes(model_config: Any) -> int:
    """For the weights, and as much again."""
    return 2 * sum(path.stat().st_size for path in Path(model_config.model).glob("*.safetensors"))


def _weights(worker: Any, loader: Any, model_config: Any) -> torch.nn.Module:
    """The loaded model before its weights are packed, so that they can be compared."""
    with _configured(worker, _needed_bytes(model_config)) as vllm_config:
        module: torch.nn.Module = loader.create_model(vllm_config, model_config)
        loader.load_weights(module, model_config)
    return module


def _load(worker: Any, loader: Any, model_config: Any, whole: bool) -> dict[str, float]:
    """Seconds for weights and model, peak of anonymous memory while weights load, in bytes."""
    found = {}
    load_weights = loader.load_weights

    def timed(*arguments: Any) -> None:
        with _peak_of_anonymous_memory() as peak:
            started = time.perf_counter()
            load_weights(*arguments)
            found["weights"] = time.perf_counter() - started
        found["peak"] = peak[0]

    loader.load_weights = timed
    with _configured(worker, _needed_bytes(model_config), whole) as vllm_config:
        started = time.perf_counter()
        loader.load_model(vllm_config, model_config)
        found["model"] = time.perf_counter() - started
    return found


@contextmanager
def _peak_of_anonymous_memory() -> Iterator[list[float]]:
    """Sampled every 5 ms by a thread that costs next to nothing."""
    status = Path("/proc/self/status")
    peak, ended = [0.0], threading.Event()

    def anonymous() -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before = anonymous()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield peak
    ended.set()
    watcher.join()
    peak[0] = max(peak[0], anonymous() - before)
