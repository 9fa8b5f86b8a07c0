"""A served model with two vectors to swap, and clients that never stop asking."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.models import plan_without_interference, random_vector, task_model
from benchmarks.served import COMPUTES, ONE_PROCESS
from enchtable_vllm.checkpoint import Checkpoint, Location, sampled_fingerprint
from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.merge import merge_checkpoint
from enchtable_vllm.plan import read_plan, resolve_plan
from enchtable_vllm.plan.vector_root import plan_path

NAMES = ("sv-a", "sv-b")
CLIENTS = 4
_NEXT_TOKEN_SECONDS = 60.0
#: After which a client whose request was lost asks again.
_AGAIN_SECONDS = 1.0
_TOKEN = "the-token-of-this-benchmark"
#: vLLM's kernels for the CPU keep something for each batch size that they have met (200 MiB were
#: seen, without a swap), and a swap makes them meet many, because the requests that it interrupts
#: are read anew. Batches are kept small here, and before memory is compared the kernels have met
#: them all, so that what is seen is what swaps add.
_MOST_BATCHED_TOKENS = 64
#: Arguments of every server that is compared.
ENGINE = [
    "--dtype", COMPUTES, "--max-model-len", "512", "--enforce-eager",
    "--disable-uvicorn-access-log",
    # All of the KV cache is in use soon: its memory is the server's when touched.
    "--num-gpu-blocks-override", "256",
    "--max-num-batched-tokens", str(_MOST_BATCHED_TOKENS), "--max-num-seqs", "16",
]  # fmt: skip


def make_root(folder: Path) -> Path:
    """Two vectors and their plans in ``root``, their merges in `merged`; the task's folder."""
    task = task_model("small", folder)
    fingerprint = sampled_fingerprint(Checkpoint(task))
    (folder / "root").mkdir()
    for seed, name in enumerate(NAMES):
        where = folder / "root" / name
        vector = random_vector(task, where, "bf16", seed=seed)
        path = plan_path(where, fingerprint)
        path.parent.mkdir()
        path.write_text(plan_without_interference(task, vector).to_json())
        plan = resolve_plan(*read_plan(path))
        merge_checkpoint(Location(task), vector, plan, merged(folder, name))
    return task


def merged(folder: Path, name: str) -> Path:
    """Where a vector's offline merge is."""
    return folder / f"merged-{name}"


class SwapServer(Server):
    """One ``vllm serve`` with a vector root."""

    def __init__(self, task: Path, folder: Path, start: str, port: int) -> None:
        extra = {"vector_root": str(folder / "root"), "safety_vector": start}
        super().__init__(
            task,
            [
                "--load-format", "enchtable", "--model-loader-extra-config", json.dumps(extra),
                *ENGINE,
            ],
            folder / f"log-{start}",
            port=port,
            variables={
                **ONE_PROCESS, "VLLM_PLUGINS": "enchtable", "ENCHTABLE_ADMIN_TOKEN": _TOKEN,
            },
        )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask a route of ours."""
        headers = {"X-Enchtable-Admin-Token": _TOKEN}
        answer = self.http.post(f"/v1/enchtable/{path}", json=body, headers=headers)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def swap(self, name: str) -> dict[str, Any]:
        """Swap a vector in."""
        return self.post("swap", {"safety_vector": name})

    def weights(self) -> object:
        """What every rank computes with, read back."""
        return self.post("probe", {})["engines"]

    def settled_bytes(self) -> int:
        """Memory while no swap is going on: the median of a few looks, since answers take some."""
        time.sleep(1)
        looks = []
        for _ in range(5):
            looks.append(self._memory_bytes())
            time.sleep(0.2)
        return int(statistics.median(looks))

    def _memory_bytes(self) -> int:
        """Of all its processes; what they share counts once (PSS)."""
        parent = psutil.Process(self.process_group)
        family = [parent, *parent.children(recursive=True)]
        return sum(process.memory_full_info().pss for process in family)


@contextmanager
def served(task: Path, folder: Path, start: str, port: int | None = None) -> Iterator[SwapServer]:
    """A server that has answered once; its port is any, unless one is given."""
    server = SwapServer(task, folder, start, port or free_port())
    with server, server.http:
        server.http.post("/v1/completions", json=_question(server, 1)).raise_for_status()
        yield server


def logprobs(server: Server) -> list[float]:
    """Of a greedy answer while nobody else asks: weights that differ, differ there."""
    question = _question(server, 1) | {"logprobs": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=question, timeout=120)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    found: list[float] = choice["logprobs"]["token_logprobs"]
    return found


class RequestLost(Exception):
    """An answer came, and is not whole."""


class Load:
    """What the clients saw."""

    def __init__(self) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.of_any_length = False
        #: When the one who reads got a token.
        self.heard: list[float] = []

    def hear(self, since: float) -> None:
        """Wait for a token that comes after a moment, if it comes at all."""
        deadline = time.monotonic() + _NEXT_TOKEN_SECONDS
        while self.heard[-1:] <= [since] and time.monotonic() < deadline:
            time.sleep(0.02)

    def silence(self, began: float, ended: float) -> float | None:
        """The longest wait for a token, of those that were going on between two moments.

        Of the one who reads; where the request was lost, until the first token of the next.
        """
        gaps = itertools.pairwise(sorted(self.heard))
        within = [after - before for before, after in gaps if after > began and before < ended]
        return max(within, default=None)


@contextmanager
def under_load(server: Server) -> Iterator[Load]:
    """Clients that ask one question after the other, and one that reads token by token."""
    seen, ended = Load(), threading.Event()

    def ask(client: int) -> None:
        dice = random.Random(client)
        with httpx.Client(base_url=server.url, timeout=120) as http:
            number = 0
            while not ended.is_set():
                number += 1
                words = dice.randrange(2 * _MOST_BATCHED_TOKENS) if seen.of_any_length else 0
                with _failures(seen, ended):
                    _ask(http, _question(server, number * CLIENTS + client, words), seen)

    def listen() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not ended.is_set():
                with _failures(seen, ended):
                    _listen(http, _question(server, 0), seen, ended)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    threads.append(threading.Thread(target=listen))
    for thread in threads:
        thread.start()
    try:
        seen.hear(0.0)  # a slow machine takes seconds for the first
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _ask(http: httpx.Client, question: dict[str, Any], seen: Load) -> None:
    answer = http.post("/v1/completions", json=question)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    if choice["finish_reason"] != "length":
        raise RequestLost(f"an answer that ends with {choice['finish_reason']}")
    if version := answer.headers.get("X-Enchtable-Version"):
        seen.versions.add(version)
    seen.answers += 1


def _listen(
    http: httpx.Client, question: dict[str, Any], seen: Load, over: threading.Event
) -> None:
    question |= {"max_tokens": 256, "stream": True}
    last = {}
    with http.stream("POST", "/v1/completions", json=question) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if over.is_set():
                return  # nobody waits for the rest
            if line.startswith("data: {"):
                seen.heard.append(time.perf_counter())
                last = json.loads(line.removeprefix("data: "))
    ended = [choice["finish_reason"] for choice in last.get("choices", ())]
    if ended != ["length"]:
        raise RequestLost(f"a stream that ends with {last}")
    seen.answers += 1


@contextmanager
def _failures(seen: Load, ended: threading.Event) -> Iterator[None]:
    """Whatever goes wrong with a request is a request lost; who lost it waits a little."""
    try:
        yield
    except Exception as error:
        seen.failures.append(f"{type(error).__name__}: {error}")
        ended.wait(_AGAIN_SECONDS)


def _question(server: Server, number: int, words: int = 0) -> dict[str, Any]:
    return {
        "model": server.command[2],
        "prompt": f"Question {number}: why is the sky " + "so " * words + "blue?",
        "max_tokens": 32,
        "temperature": 0,
        "ignore_eos": True,
    }
