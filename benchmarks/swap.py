"""Swapping under load, against a restart of the same server.

    python benchmarks/swap.py [--swaps 20] [--soak 500]

A real server of the small real model (SmolLM2-135M-Instruct) with two attention-scope vectors;
four clients ask for completions all the time, and one reads its answers token by token. Back and
forth, ``--swaps`` times; printed are the medians of how long generation took to stop (the step that
it is in), of the paused window, of the longest wait for a next token that a swap caused, of staging
and of the whole swap, and the time of a restart, from the old server's end to the new one's first
answer, measured in the same run. ``--soak`` goes on to as many swaps and prints how memory and
requests fared.

Correctness first: the weights that the ranks compute with are read back, and must be those of a
fresh start on either vector; every answer must be whole, and come from one vector or the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil
from _harness import row, write
from load import plan_without_interference, random_vector

from enchtable_vllm.checkpoint import Checkpoint, Location, sampled_fingerprint
from enchtable_vllm.demo.fetch import small_model
from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.envs import cache_folder
from enchtable_vllm.plan.vector_root import plan_path
from enchtable_vllm.vector import SafetyVector

NAMES = ("sv-a", "sv-b")
TOKEN = "the-token-of-this-benchmark"
CLIENTS = 4
MOST_PAUSED_SECONDS = 0.15
MOST_OF_A_RESTART = 1 / 100
MOST_GROWTH = 0.03
SETTLED_AFTER = 5
#: vLLM's kernels for the CPU keep something for each batch size that they have met (200 MiB were
#: seen, without a swap), and a swap makes them meet many, because the requests that it interrupts
#: are read anew. Batches are kept small here, and before memory is compared the kernels have met
#: them all, so that what is seen is what swaps add.
MOST_BATCHED_TOKENS = 64
WARM_UP_SECONDS = 60.0


def main() -> None:
    """Measure, print, append rows to results/swap.csv; exit 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--soak", type=int, default=0, help="swaps in all; 500 is the claim")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="enchtable-swap-") as scratch:
        folder = Path(scratch)
        # In a process of its own: it imports what this one needs no more.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            task = pool.submit(_make, folder).result()
        fresh, restart = _restart(task, folder)
        with _served(task, folder, "sv-a") as server, _load(server) as load:
            found = _swaps(server, options.swaps, fresh, load)
            memory = _soak(server, options, load) if options.soak else None
    raise SystemExit(_report(found, restart, load, memory))


def _make(folder: Path) -> Path:
    task = small_model(cache_folder() / "demo" / "smollm2-135m-instruct")
    fingerprint = sampled_fingerprint(Checkpoint(task))
    (folder / "root").mkdir()
    for seed, name in enumerate(NAMES):
        where = random_vector(task, folder / "root" / name, "bf16", seed=seed)
        path = plan_path(where, fingerprint)
        path.parent.mkdir()
        vector = SafetyVector(Location(where))
        path.write_text(plan_without_interference(task, vector).to_json())
    return task


class _Server(Server):
    """One ``vllm serve`` with a vector root."""

    def __init__(self, task: Path, folder: Path, start: str) -> None:
        extra = {"vector_root": str(folder / "root"), "safety_vector": start}
        super().__init__(
            task,
            [
                "--load-format", "enchtable", "--model-loader-extra-config", json.dumps(extra),
                "--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager",
                "--disable-uvicorn-access-log",
                # All of the KV cache is in use soon: its memory is the server's when touched.
                "--num-gpu-blocks-override", "256",
                "--max-num-batched-tokens", str(MOST_BATCHED_TOKENS), "--max-num-seqs", "16",
            ],
            folder / f"log-{start}",
            port=free_port(),
            variables={"VLLM_PLUGINS": "enchtable", "ENCHTABLE_ADMIN_TOKEN": TOKEN},
        )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"X-Enchtable-Admin-Token": TOKEN}
        answer = self.http.post(f"/v1/enchtable/{path}", json=body, headers=headers)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def weights(self) -> object:
        return self.post("probe", {})["engines"]

    def memory_bytes(self) -> int:
        """Of all its processes; what they share counts once (PSS)."""
        parent = psutil.Process(self.process_group)
        family = [parent, *parent.children(recursive=True)]
        return sum(process.memory_full_info().pss for process in family)


@contextmanager
def _served(task: Path, folder: Path, start: str) -> Any:
    server = _Server(task, folder, start)
    with server:
        _first_answer(server)
        yield server
        server.http.close()


def _first_answer(server: _Server) -> None:
    answer = server.http.post("/v1/completions", json=_question(server, 1))
    answer.raise_for_status()


def _question(server: _Server, number: int, words: int = 0) -> dict[str, Any]:
    return {
        "model": server.command[2],
        "prompt": f"Question {number}: why is the sky " + "so " * words + "blue?",
        "max_tokens": 32,
        "temperature": 0,
        "ignore_eos": True,
    }


def _restart(task: Path, folder: Path) -> tuple[dict[str, object], float]:
    """What a fresh start on each vector serves, and the seconds from stop to first answer."""
    fresh = {}
    with _served(task, folder, "sv-a") as server:
        fresh["sv-a"] = server.weights()
        started = time.perf_counter()
    with _served(task, folder, "sv-b") as server:
        seconds = time.perf_counter() - started
        fresh["sv-b"] = server.weights()
    assert fresh["sv-a"] != fresh["sv-b"]
    return fresh, seconds


class _Load:
    """What the clients saw."""

    def __init__(self) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.of_any_length = False
        #: When a stream had a token before, and when it got its next one.
        self.waits: list[tuple[float, float]] = []

    def longest_wait(self, began: float, ended: float) -> float | None:
        """For a next token, of those waits that were going on between two moments."""
        within = [
            after - before for before, after in self.waits if after > began and before < ended
        ]
        return max(within, default=None)


@contextmanager
def _load(server: _Server) -> Any:
    """Four clients that ask one question after the other."""
    seen, ended = _Load(), threading.Event()

    def ask(client: int) -> None:
        dice = random.Random(client)
        with httpx.Client(base_url=server.url, timeout=120) as http:
            number = 0
            while not ended.is_set():
                number += 1
                try:
                    words = dice.randrange(2 * MOST_BATCHED_TOKENS) if seen.of_any_length else 0
                    question = _question(server, number * CLIENTS + client, words)
                    answer = http.post("/v1/completions", json=question)
                    answer.raise_for_status()
                    (choice,) = answer.json()["choices"]
                    if choice["finish_reason"] != "length":
                        seen.failures.append(str(choice["finish_reason"]))
                    seen.versions.add(answer.headers["X-Enchtable-Version"])
                    seen.answers += 1
                except Exception as error:
                    seen.failures.append(f"{type(error).__name__}: {error}")

    def listen() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not ended.is_set():
                question = _question(server, 0) | {"max_tokens": 256, "stream": True}
                try:
                    before = None
                    with http.stream("POST", "/v1/completions", json=question) as answer:
                        for line in answer.iter_lines():
                            if line.startswith("data: {"):
                                now = time.perf_counter()
                                if before is not None:
                                    seen.waits.append((before, now))
                                before = now
                    seen.answers += 1
                except Exception as error:
                    seen.failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    threads.append(threading.Thread(target=listen))
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _swaps(
    server: _Server, count: int, fresh: dict[str, object], load: _Load
) -> dict[str, list[float]]:
    for name in (*NAMES[::-1], NAMES[1]):  # correct first, and whatever is made once is made
        server.post("swap", {"safety_vector": name})
        if server.weights() != fresh[name]:
            raise SystemExit(f"after a swap to '{name}' the weights are not those of a fresh start")
    times = ("pausing", "paused", "staging", "swap")
    found: dict[str, list[float]] = {key: [] for key in (*times, "wait")}
    for number in range(count):
        answer = server.post("swap", {"safety_vector": NAMES[number % 2]})
        answered = time.perf_counter()
        assert answer["outcome"] == "swapped", answer
        for key in times:
            found[key].append(answer[f"{key}_seconds"])
        time.sleep(0.5)  # the next token has come by then
        stopped = answer["pausing_seconds"] + answer["paused_seconds"]
        if (wait := load.longest_wait(answered - stopped, answered)) is not None:
            found["wait"].append(wait)
    if load.failures:
        raise SystemExit(f"{len(load.failures)} requests failed: {load.failures[0]}")
    return found


def _soak(server: _Server, options: argparse.Namespace, load: _Load) -> tuple[int, int]:
    """Memory when it has settled, and at the end."""
    load.of_any_length = True
    time.sleep(WARM_UP_SECONDS)
    before = 0
    for number in range(options.soak):
        server.post("swap", {"safety_vector": NAMES[(number + options.swaps) % 2]})
        if number + 1 == SETTLED_AFTER:
            before = _settled(server)
        elif (number + 1) % 50 == 0:
            print(f"  {number + 1} swaps: {_settled(server) / 2**20:.0f} MiB", flush=True)
    return before, _settled(server)


def _settled(server: _Server) -> int:
    """Memory while no swap is going on: the median of a few looks, since answers take some."""
    time.sleep(1)
    looks = []
    for _ in range(5):
        looks.append(server.memory_bytes())
        time.sleep(0.2)
    return int(statistics.median(looks))


def _report(
    found: dict[str, list[float]], restart: float, load: _Load, memory: tuple[int, int] | None
) -> int:
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    shape, medians = "SmolLM2-135M attention", {k: statistics.median(v) for k, v in found.items()}
    paused = medians["paused"]
    usual = statistics.median(after - before for before, after in load.waits)
    print(f"pausing  {medians['pausing'] * 1e3:8.1f} ms   the step that was going on ends")
    print(f"paused   {paused * 1e3:8.1f} ms   bound {MOST_PAUSED_SECONDS * 1e3:.0f} ms")
    print(
        f"wait     {medians['wait'] * 1e3:8.1f} ms   for a stream's next token, its cache being "
        f"computed anew; {usual * 1e3:.1f} ms at other times"
    )
    print(f"staging  {medians['staging'] * 1e3:8.1f} ms   while serving goes on")
    print(f"swap     {medians['swap'] * 1e3:8.1f} ms   from request to answer")
    print(f"restart  {restart * 1e3:8.1f} ms   paused / restart = 1/{restart / paused:.0f}")
    print(f"requests {load.answers:8d}      {len(load.failures)} failed, {CLIENTS} clients")
    rows = [row(f"swap_{key}", "enchtable", shape, "bf16", found[key]) for key in found]
    rows.append(row("restart", "vllm serve", shape, "bf16", [restart] * 2))
    missed = [paused > MOST_PAUSED_SECONDS, paused > restart * MOST_OF_A_RESTART]
    missed.append(bool(load.failures) or len(load.versions) != len(NAMES))
    if memory is not None:
        growth = memory[1] / memory[0] - 1
        print(
            f"memory   {memory[0] / 2**20:8.0f} MiB after {SETTLED_AFTER} swaps, "
            f"{memory[1] / 2**20:.0f} MiB at the end: {growth:+.1%}"
        )
        values = [float(value) for value in memory]
        rows.append(
            row("swap_memory", "enchtable", shape, "bf16", values, metric="memory", unit="B")
        )
        missed.append(abs(growth) > MOST_GROWTH)
    print(f"rows appended to {write('swap', rows, device)}")
    return int(any(missed))


if __name__ == "__main__":
    main()
