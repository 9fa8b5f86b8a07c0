"""The fused addition on the CPU, against memcpy of as many bytes and against torch.

memcpy moves what the addition must: half of its bytes in, half out. ``torch.add`` is one call
that keeps no statistics and, in 16 bits, rounds twice: it does less, and other bits come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from pydantic import Field

from benchmarks import kernels_steps
from benchmarks.harness import Options as BaseOptions
from benchmarks.harness import Row, interleaved, row
from benchmarks.harness.interval import ratio
from benchmarks.harness.results import Results
from benchmarks.harness.tables import Table
from benchmarks.harness.units import shown
from benchmarks.kernels_cases import Variant, ours, variants, verify_variants
from benchmarks.kernels_registers import registers
from enchtable_kernels._addition import Addition
from enchtable_kernels.reference import fused_add_reference

PEER = "memcpy"
QUICK = {"mebibytes": 1, "rounds": 3, "capabilities": ()}
FULL = {"every_variant": True, "capabilities": (80, 90, 100)}


class Options(BaseOptions):
    """Of the addition on the CPU."""

    mebibytes: int = Field(default=64, description="size of the weights")
    rounds: int = Field(default=9, ge=1, description="how often each is timed")
    every_variant: bool = Field(default=False, description="all 32, not the two usual ones")
    capabilities: tuple[int, ...] = Field(
        default=(90,),
        description="of NVIDIA's GPUs to compile for, 90 is 9.0: registers, spills, occupancy",
    )


def _wanted(options: Options) -> Sequence[Variant]:
    usual = (Variant(), Variant(delta=torch.int8))
    return tuple(variants()) if options.every_variant else usual


def verify(_: Options) -> None:
    """Bit for bit the reference, every variant."""
    verify_variants(tuple(variants()), "cpu")


def measure(options: Options) -> Iterator[Row]:
    """Time each variant."""
    for variant in _wanted(options):
        addition = variant.addition(variant.elements(options.mebibytes * 2**20), "cpu")
        moved = int(variant.bytes_an_element * addition.stored.numel()) // 2 * 2
        made = functools.partial(
            row, "fused_add", shape=f"{options.mebibytes} MiB, {variant}", dtype=variant.dtype
        )
        timed = interleaved(_providers(variant, addition, moved), options.rounds)
        for provider, seconds in timed.items():
            yield made(provider, values=seconds)
            speed = [moved / value for value in seconds]
            yield made(provider, values=speed, metric="bandwidth", unit="B/s")
    yield from kernels_steps.steps(options.scratch, options.rounds)
    for capability in options.capabilities:
        yield from registers(capability)


def _providers(variant: Variant, addition: Addition, moved: int) -> dict[str, Callable[[], object]]:
    source, target = (torch.empty(moved // 2, dtype=torch.uint8) for _ in range(2))
    found: dict[str, Callable[[], object]] = {
        PEER: lambda: target.copy_(source),
        "fused_add": lambda: ours(addition),
        "torch reference": lambda: fused_add_reference(addition),
    }
    if variant == Variant():
        found["torch.add"] = lambda: torch.add(
            addition.stored, addition.delta, alpha=addition.coefficient, out=addition.out
        )
    return found


def _table(results: Results) -> Table:
    rows = [row for row in results.published("kernels") if row.metric == "time"]
    floors = {row.what: row for row in rows if row.provider == PEER}
    lines = [
        [row.shape, row.provider, shown(row.p50, "s"), str(ratio(row, floors[row.what]))]
        for row in rows
    ]
    return Table(["weights + delta", "by", "median", "÷ memcpy"], lines, rows)


TABLES = {"kernels": _table, "kernels-steps": kernels_steps.table}
