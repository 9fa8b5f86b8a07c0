"""What made a row: machine, versions, commit, time, command."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.harness.options import Size
from benchmarks.harness.registry import Device
from benchmarks.harness.rows import Row

_ROOT = Path(__file__).parent.parent.parent
_PACKAGES = ("torch", "triton", "vllm", "numpy")
#: A run writes these: they make no tree dirty.
_WRITTEN = (":!benchmarks/results", ":!docs", ":!README.md")


def command(name: str, size: Size, assignments: Sequence[str]) -> str:
    """What to type to measure that again."""
    words = ["python", "-m", "benchmarks", "run", name]
    words += [] if size == "default" else [f"--{size}"]
    return shlex.join(words + [word for one in assignments for word in ("-o", one)])


def stamped(rows: Iterable[Row], device: Device, typed: str) -> list[Row]:
    """The rows of one run, with what made them."""
    provenance = {**made_now(device), "command": typed}
    # These columns are text; mypy asks it of every column, numbers too.
    return [dataclasses.replace(row, **provenance) for row in rows]  # type: ignore[arg-type]


def made_now(device: Device) -> dict[str, str]:
    """What makes a figure at this moment, in the columns of results."""
    return {
        "device": machine(device),
        "versions": versions(),
        "git_sha": git_sha(),
        "utc": now(),
    }


def machine(device: Device) -> str:
    """The GPU; or the processor and how much of it this process may use, with the GPU beside it.

    vLLM serves on a GPU wherever there is one, whatever a benchmark needs.
    """
    import torch

    gpu: str = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if device == "cuda":
        return gpu
    cores = len(os.sched_getaffinity(0))
    processor = f"{_processor()}, {cores} core{'s' * (cores != 1)}"
    return f"{gpu}, {processor}" if gpu else processor


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else f"{platform.machine()} CPU"


def versions() -> str:
    """Of Python and of what does the work, and how the system gives memory."""
    found = [f"python={platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join([*found, *_large_pages()])


def _large_pages() -> list[str]:
    """Whether processes get memory in pages of 2 MiB: always, where they ask (madvise), never."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return [f"large-pages={chosen[1]}"] if chosen else []


def git_sha() -> str:
    """Of the commit, ``-dirty`` where the code is another; nothing outside a clone."""
    sha = _git("rev-parse", "--short", "HEAD")
    dirty = sha and _git("status", "--porcelain", "--", ".", *_WRITTEN)
    return f"{sha}-dirty" if dirty else sha


def now() -> str:
    """To the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=_ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""
