"""Loading through ``--load-format enchtable``, against plain vLLM and against merging to disk.

Within one vLLM process, interleaved: the loader's ``load_model``, and in it ``load_weights``, which
is what vLLM logs as "Loading weights took"; for us it holds reading and hashing the vector, and
merging. ``load_model`` holds besides, for both, making the empty model and packing its weights,
and for us opening and checking plan, vector and task model. Its peak is of the anonymous part of
the process: files that are mapped cost none. *Cold*: the files are out of the page cache.

And from outside: the seconds from ``vllm serve`` to a healthy API, and each rank's peak resident
memory until then. *merge to disk, then auto* includes the merge.

What is loaded must equal, bit for bit, what plain vLLM loads from the offline merge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from benchmarks import load_cases, load_worker
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness import Row, row
from benchmarks.load_bounds import bounds
from benchmarks.load_pages import TABLES
from benchmarks.load_serving import until_ready
from benchmarks.load_worker import AUTO, Plan, run_in_vllm
from benchmarks.served import apart

__all__ = ["FULL", "PEER", "QUICK", "TABLES", "Options", "bounds", "measure", "verify"]

PEER = AUTO
QUICK = {"models": ("small",), "rounds": 1, "cold_rounds": 1, "starts": 0}
FULL = {
    "rounds": 19, "cold_rounds": 5, "threads": (1, 2),
    "starts": 5, "start_all": True, "ranks": (1, 2),
}  # fmt: skip


class Options(BaseOptions):
    """Of loading."""

    models: tuple[str, ...] = Field(default=("small", "1b"), description="small, 1b")
    rounds: int = Field(default=7, ge=1, description="how often each is loaded, warm")
    cold_rounds: int = Field(default=2, description="how often cold")
    threads: tuple[int, ...] = Field(
        default_factory=lambda: (torch.get_num_threads(),), description="torch's, one after another"
    )
    memory: Literal["whole", "scattered"] = Field(
        default="whole", description="how what is free lies before each load"
    )
    starts: int = Field(default=1, description="how often each server starts; 0: none")
    start_all: bool = Field(default=False, description="int8 and merged to disk are served, too")
    ranks: tuple[int, ...] = Field(default=(1,), description="of those servers")


def verify(options: Options) -> None:
    """Make the models; that what is loaded of them is right, the worker shows before it times."""
    for which in options.models:
        apart(load_cases.make, which, options.scratch / which)


def measure(options: Options) -> Iterator[Row]:
    """Seconds and peaks, inside one rank and from outside."""
    rounds = {"warm": options.rounds, "cold": options.cold_rounds}
    plan = Plan(rounds, options.threads, options.memory == "whole")
    for which in options.models:
        case = load_cases.case(which, options.scratch / which)
        # vLLM 0.32 does not start where llvmlite was imported before.
        found: load_worker.Found = apart(run_in_vllm, case, load_worker.measure_loads, plan)
        for (provider, cache, threads), readings in found.items():
            of = f"{case.name}, {cache}, {threads} thread{'s' * (threads > 1)}"
            made = functools.partial(row, provider=provider, shape=of, dtype="bf16")
            yield made("load_weights", values=readings["weights"])
            yield made("load_model", values=readings["model"])
            yield made("load_weights", values=readings["peak"], metric="peak", unit="B")
    if options.starts:
        case = load_cases.case(options.models[0], options.scratch / options.models[0])
        for ranks in options.ranks:
            providers = case.providers() if options.start_all else [AUTO, "enchtable bf16"]
            yield from until_ready(case, providers, options.starts, ranks)
