"""Servers of a run's models, and the commands that are run against them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from enchtable_vllm.demo.measure import AT_ONCE
from enchtable_vllm.demo.server import Server, free_port, served_dtype

from .steps import Steps

TOKEN = "the-token-of-this-benchmark"
_SWAPPABLE = {"VLLM_PLUGINS": "enchtable", "ENCHTABLE_ADMIN_TOKEN": TOKEN}
_SERVE = (
    "--max-model-len", "1024", "--enforce-eager",
    "--disable-uvicorn-access-log",
)  # fmt: skip


class Lazy:
    """A server that starts when it is first asked for: not where all its steps are done.

    Its port is kept in the log's folder, because a sweep goes on with the server that it began
    with, by its address.

    Args:
        model: The model's folder.
        arguments: Further ones of ``vllm serve``; with those of `merging` it can be swapped.
        log: Where its output goes.
        steps: Times its start.
    """

    def __init__(self, model: Path, arguments: Sequence[str], log: Path, steps: Steps) -> None:
        self._model, self._arguments, self._log, self._steps = model, arguments, log, steps
        self._server: Server | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.stop()

    @property
    def url(self) -> str:
        """Where it answers."""
        return self._running().url

    def _running(self) -> Server:
        if self._server is None:
            kept = self._log.with_suffix(".port")
            if not kept.exists():
                kept.write_text(str(free_port()))
            self._server = Server(
                self._model,
                [*self._arguments, "--dtype", served_dtype(), *_SERVE],
                self._log,
                port=int(kept.read_text()),
                variables=_SWAPPABLE if "enchtable" in self._arguments else {},
            )
            with self._steps.timed(f"start of {self._log.stem}"):
                self._server.__enter__()
        return self._server

    def ask(self, questions: Sequence[str], *, max_tokens: int) -> list[str]:
        """Greedy answers."""
        return self._running().ask(questions, max_tokens, together=AT_ONCE)

    def swap(self, safety_vector: str, beta: float | None) -> None:
        """Have it serve a vector at some β; ``@none`` for none."""
        body = {"safety_vector": safety_vector, **({} if beta is None else {"beta": beta})}
        answer = httpx.post(
            f"{self.url}/v1/enchtable/swap",
            json=body,
            headers={"X-Enchtable-Admin-Token": TOKEN},
            timeout=600,
        )
        answer.raise_for_status()

    def retained_share(self) -> float | None:
        """Of what it serves now."""
        answer = httpx.get(f"{self.url}/v1/enchtable/status", timeout=60)
        found: float | None = answer.raise_for_status().json()["active"]["retained_share"]
        return found


def merging(root: Path, **keys: str) -> list[str]:
    """Arguments of a server that merges, and starts without a vector."""
    config = {"vector_root": str(root), "safety_vector": "@none", **keys}
    return ["--load-format", "enchtable", "--model-loader-extra-config", json.dumps(config)]


def enchtable(*words: object, log: Path) -> None:
    """Run a command, as a user would, and append what it prints to a log.

    Raises:
        SystemExit: It failed; the end of what it printed says why.
    """
    command = [str(word) for word in words]
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ enchtable {shlex.join(command)}\n")
        output.flush()
        done = subprocess.run(
            [sys.executable, "-m", "enchtable_vllm.cli", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ENCHTABLE_ADMIN_TOKEN": TOKEN},
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"'enchtable {command[0]}' failed ({done.returncode}):\n{tail}")
