"""A ``vllm serve`` process on loopback: started, waited for, asked, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI

from enchtable_vllm.distill.precision import computes_bf16
from enchtable_vllm.errors import EnchTableError

_START_SECONDS = 600
_STOP_SECONDS = 60


class ServerError(EnchTableError):
    """The server did not come up."""


def served_dtype() -> str:
    """For ``vllm serve --dtype``: a bf16 checkpoint is computed in fp32 where bf16 is slow."""
    return "bfloat16" if computes_bf16() else "float32"


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One ``vllm serve``; a context manager that stops it unless told to keep it.

    Args:
        model: The model's folder.
        arguments: Further arguments of ``vllm serve``.
        log: Where its output goes.
        port: Its port on loopback.
        variables: Further environment variables.
        waiting: Called with the seconds waited so far.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        log: Path,
        *,
        port: int,
        variables: Mapping[str, str] = MappingProxyType({}),
        waiting: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.keep = False
        self._waiting = waiting
        vllm = Path(sys.executable).with_name("vllm")
        self.command = [str(vllm), "serve", str(model), *arguments]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment, **variables},
                # Not a session of its own: with autogroups, Linux 6.18 lets ranks that spin keep
                # whoever asks them from another session off the core for a second at a time.
                process_group=0,
            )
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def __enter__(self) -> Self:
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or not self.keep:
            self.stop()

    @property
    def process_group(self) -> int:
        """What to signal to end it with all its workers."""
        return self._process.pid

    def lines(self, containing: str) -> list[str]:
        """The log's lines that contain a text."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if containing in line]

    def ask(
        self, questions: Sequence[str], max_tokens: int = 24, *, together: int = 8
    ) -> list[str]:
        """Greedy answers, some questions at a time."""
        with ThreadPoolExecutor(together) as pool:
            return list(pool.map(lambda question: self._ask(question, max_tokens), questions))

    def stop(self) -> None:
        """Ask it to stop, and make it stop if it does not."""
        for number, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 10)):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue

    def _ask(self, question: str, max_tokens: int) -> str:
        answer = self._client.chat.completions.create(
            model=self.command[2],
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=max_tokens,
        )
        return (answer.choices[0].message.content or "").strip()

    def _wait(self) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < _START_SECONDS:
            self._waiting(waited)
            if self._process.poll() is not None:
                break
            try:
                with urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (URLError, OSError):
                time.sleep(0.5)
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise ServerError(
            f"'{' '.join(self.command)}'",
            expected="a healthy server",
            got=f"exit code {self._process.poll()} after {waited:.0f} s",
            fix="The end of its log:\n" + "\n".join(tail),
        )
