"""A served model until its API is ready: seconds, and each rank's peak resident memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.harness import Row, row
from benchmarks.load_worker import AUTO, MERGED, Case, rotated
from benchmarks.served import COMPUTES, DTYPE
from enchtable_vllm.demo.server import Server, free_port


def until_ready(case: Case, providers: Sequence[str], starts: int, ranks: int) -> Iterator[Row]:
    """Start a server for each provider, so often, one after the other.

    Files, bytecode and the compiled loop are in their caches: all have been loaded before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    peaks: dict[str, list[float]] = {name: [] for name in seconds}
    for number in range(starts):
        for provider in rotated(providers, number):
            took, each_rank = _start(case, provider, ranks)
            seconds[provider].append(took)
            peaks[provider] += each_rank
    shape = f"{case.name}, {ranks} rank{'s' * (ranks > 1)}"
    for provider, values in seconds.items():
        yield row("api_ready", provider, shape, DTYPE, values)
        yield row(
            "api_ready", provider, shape, DTYPE, peaks[provider], metric="peak of a rank", unit="B"
        )


def _start(case: Case, provider: str, ranks: int) -> tuple[float, list[float]]:
    """Seconds from the first command to a healthy API, and the peak of each rank."""
    arguments = ["--dtype", COMPUTES, "--max-model-len", "128", "--max-num-seqs", "1",
                 "--enforce-eager", "--skip-tokenizer-init", "-tp", str(ranks)]  # fmt: skip
    model, started = case.task, time.perf_counter()
    if provider == MERGED:
        model = _merge(case)
    elif provider != AUTO:
        extra = json.dumps(case.extra(provider.removeprefix("enchtable ")))
        arguments += ["--load-format", "enchtable", "--model-loader-extra-config", extra]
    plugins = {"VLLM_PLUGINS": "" if provider in (AUTO, MERGED) else "enchtable"}
    log = case.scratch / "server.log"
    with Server(model, arguments, log, port=free_port(), variables=plugins) as server:
        return time.perf_counter() - started, _peaks(psutil.Process(server.process_group))


def _merge(case: Case) -> Path:
    """By the command that a user would type."""
    target = case.scratch / "served"
    shutil.rmtree(target, ignore_errors=True)
    vector, plan = next(iter(case.vectors.values()))
    command = [sys.executable, "-m", "enchtable_vllm.cli", "merge", "--task-model", str(case.task),
               "--safety-vector", str(vector), "--plan", str(plan), "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return target


def _peaks(server: psutil.Process) -> list[float]:
    """Of its ranks: workers, or the engine itself where it is the only rank."""
    family = {child: " ".join(child.cmdline()) for child in server.children(recursive=True)}
    for kind in ("Worker", "EngineCore"):
        if ranks := [child for child, line in family.items() if kind in line]:
            return [_peak(child.pid) for child in ranks]
    raise AssertionError(f"no rank among {list(family.values())}")


def _peak(pid: int) -> float:
    """VmHWM: the most that was ever resident, mapped files included."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return float(kilobytes) * 1024
