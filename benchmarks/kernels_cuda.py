"""The fused addition on a CUDA device: every variant, by size, as a share of a measured copy.

The copy moves as many bytes as the variant must, half of them in and half out, on the same
device, in the same rounds. The peers do the same work in torch, eager and compiled, statistics
included; ``torch.add`` is one call that keeps none, and in 16 bits rounds twice. Times are the
device's own (events), with the second-level cache cleared before each, by Triton's ``do_bench``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from pydantic import Field

from benchmarks.harness import NotVerified, Row, row
from benchmarks.harness import Options as BaseOptions
from benchmarks.kernels_cases import Variant, ours, variants, verify_variants
from benchmarks.kernels_cuda_pages import PLOTS, TABLES, bounds
from benchmarks.kernels_plain import Arguments, plain
from benchmarks.kernels_registers import registers
from enchtable_kernels._addition import Addition

__all__ = ["FULL", "PEER", "PLOTS", "QUICK", "TABLES", "Options", "bounds", "measure", "verify"]

PEER = "copy"
QUICK = {"mebibytes": (1, 16), "rounds": 1, "every_variant": False, "compiled": False}
FULL = {"rounds": 9, "milliseconds": 50}


class Options(BaseOptions):
    """Of the addition on a GPU."""

    mebibytes: tuple[int, ...] = Field(
        default=tuple(2**i for i in range(12)), description="sizes of the weights"
    )
    rounds: int = Field(default=3, ge=1, description="of all providers, one after the other")
    milliseconds: int = Field(default=20, description="that each is repeated in a round")
    every_variant: bool = Field(default=True, description="all 32, not the two usual ones")
    compiled: bool = Field(default=True, description="against torch.compile too")


def _wanted(options: Options) -> Sequence[Variant]:
    return tuple(variants()) if options.every_variant else (Variant(), Variant(delta=torch.int8))


def verify(options: Options) -> None:
    """Every bit is the reference's; what torch is asked for is the same sum."""
    verify_variants(tuple(variants()), "cuda")
    verify_peer(_wanted(options), "cuda")


def verify_peer(wanted: Sequence[Variant], device: str) -> None:
    """The peer in eager torch gives our bits: it is no other, easier sum.

    Raises:
        NotVerified: It does not.
    """
    for variant in wanted:
        addition = variant.addition(variant.elements(2**16), device)
        merged = ours(addition).view(-1)
        theirs = plain(*Arguments.of(addition).tuple())[0].view(-1)
        if not torch.equal(theirs, merged):
            raise NotVerified(
                f"torch eager, {variant}", expected="our bits", got="others", fix="Mend `plain`."
            )


def measure(options: Options) -> Iterator[Row]:
    """Time every variant at every size; then what the compiler made of it."""
    for variant in _wanted(options):
        # Each variant is compiled by itself; eager is never timed in the name of compiled.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for mebibytes in options.mebibytes:
            yield from _size(variant, mebibytes, options)
    major, minor = torch.cuda.get_device_capability()
    yield from registers(10 * major + minor)


def _size(variant: Variant, mebibytes: int, options: Options) -> Iterator[Row]:
    shape = f"{mebibytes} MiB, {variant}"
    try:
        addition = variant.addition(variant.elements(mebibytes * 2**20), "cuda")
    except torch.OutOfMemoryError as error:
        _left_out(shape, "all", error)
        return
    moved = int(variant.bytes_an_element * addition.stored.numel()) // 2 * 2
    ready = _that_run(shape, _providers(variant, addition, moved, options))
    made = functools.partial(row, "fused_add", shape=shape, dtype=variant.dtype)
    for name, seconds in _timed(ready, options).items():
        yield made(name, values=seconds)
        yield made(name, values=[moved / s for s in seconds], metric="bandwidth", unit="B/s")


def _that_run(
    shape: str, providers: Mapping[str, Callable[[], object]]
) -> dict[str, Callable[[], object]]:
    """Ours must run; a peer that has no memory, or that its compiler cannot do, is left out."""
    ready = {}
    for name, run in providers.items():
        try:
            run()
        except Exception as error:
            if name in (PEER, "fused_add"):
                raise
            _left_out(shape, name, error)
        else:
            ready[name] = run
        torch.cuda.empty_cache()
    return ready


def _providers(
    variant: Variant, addition: Addition, moved: int, options: Options
) -> dict[str, Callable[[], object]]:
    device = addition.stored.device
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    arguments = Arguments.of(addition).tuple()
    found: dict[str, Callable[[], object]] = {
        PEER: lambda: target.copy_(source),
        "fused_add": lambda: ours(addition),
        "torch eager": lambda: plain(*arguments),
    }
    if options.compiled:
        compiled = torch.compile(plain)
        found["torch.compile"] = lambda: compiled(*arguments)
    if variant == Variant():
        found["torch.add"] = lambda: torch.add(
            addition.stored, addition.delta, alpha=addition.coefficient, out=addition.out
        )
    return found


def _timed(ready: Mapping[str, Callable[[], object]], options: Options) -> dict[str, list[float]]:
    """Seconds, interleaved by rounds."""
    from triton.testing import do_bench

    found: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(options.rounds):
        for name, run in ready.items():
            each = do_bench(run, warmup=5, rep=options.milliseconds, return_mode="all")
            found[name] += [milliseconds / 1e3 for milliseconds in each]
    return found


def _left_out(shape: str, who: str, why: Exception) -> None:
    reason = f"{type(why).__name__}: {str(why).splitlines()[0][:200]}"
    print(f"{shape}: left out: {who}: {reason}", file=sys.stderr)
