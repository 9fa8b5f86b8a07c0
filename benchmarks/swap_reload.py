"""vLLM's own way to give a running server other weights: all of them, while it stands still.

A server without a plugin of ours, in vLLM's development mode, whose routes can pause it, have its
workers read a folder into the model, and resume it. The folders are the offline merges of the
vectors that are swapped elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.served import ONE_PROCESS
from benchmarks.swap_server import ENGINE, NAMES, Load, logprobs, merged, under_load
from enchtable_vllm.demo.server import Server, free_port


class ReloadServer(Server):
    """One ``vllm serve`` of plain vLLM, of the first vector's offline merge."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            merged(folder, NAMES[0]), ENGINE, folder / "log-reload", port=free_port(),
            variables={**ONE_PROCESS, "VLLM_PLUGINS": "", "VLLM_SERVER_DEV_MODE": "1"},
        )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def reload(self, model: Path) -> tuple[float, float]:
        """Other weights.

        Returns:
            How long generation took to stop, and how long it then stood still; seconds.
        """
        began = time.perf_counter()
        self._post("/pause", params={"mode": "keep"})
        paused = time.perf_counter()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
        self._post("/collective_rpc", json=body)
        self._post("/resume")
        return paused - began, time.perf_counter() - paused

    def _post(self, path: str, **request: object) -> None:
        self.http.request("POST", path, **request).raise_for_status()  # type: ignore[arg-type]


@contextmanager
def reloading(folder: Path) -> Iterator[ReloadServer]:
    """A server that is up."""
    server = ReloadServer(folder)
    with server, server.http:
        yield server


def answers(server: ReloadServer, folder: Path) -> dict[str, list[float]]:
    """What it answers after it was reloaded with each vector's merge: log probabilities."""
    found = {}
    for name in reversed(NAMES):  # it began with the first
        server.reload(merged(folder, name))
        found[name] = logprobs(server)
    return found


def timed(
    server: ReloadServer, folder: Path, count: int
) -> tuple[list[tuple[float, float, float, float]], Load]:
    """Reloads back and forth under the load that swaps are under, and what the clients saw.

    Returns:
        Of each, what `ReloadServer.reload` returns, and when it began and ended; seconds.
    """
    with under_load(server) as load:
        found = []
        for number in range(count):
            began = time.perf_counter()
            stopped = server.reload(merged(folder, NAMES[1 - number % 2]))
            found.append((*stopped, began, time.perf_counter()))
            time.sleep(0.5)
    return found, load
