"""Runs one benchmark: first the proof, then the figures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.options import Options, Size, parse
from benchmarks.harness.provenance import command, stamped
from benchmarks.harness.registry import Benchmark, Device
from benchmarks.harness.rows import Row


def run(
    benchmark: Benchmark,
    size: Size,
    assignments: Sequence[str],
    *,
    measured: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Verify a benchmark, then measure it.

    Args:
        benchmark: Which.
        size: See `Size`.
        assignments: The user's options, ``name=value``.
        measured: False ends it after the proof.
        say: Called with a line for people.

    Returns:
        Stamped rows, none of them before all were measured.

    Raises:
        NotVerified: It does not do what it should: there are no rows.
        ConfigError: No such option, or no such value.
    """
    with tempfile.TemporaryDirectory(prefix=f"enchtable-{benchmark.name}-") as scratch:
        options = parse(benchmark.options, benchmark.preset(size), assignments, Path(scratch))
        say(f"{benchmark.name}: verifying")
        benchmark.verify(options)
        if not measured:
            return []
        say(f"{benchmark.name}: verified; measuring")
        return _measure(benchmark, options, command(benchmark.name, size, assignments))


def _measure(benchmark: Benchmark, options: Options, typed: str) -> list[Row]:
    return stamped(list(benchmark.measure(options)), benchmark.device, typed)


def unavailable(device: Device) -> str | None:
    """Why that device cannot be measured here; None where it can."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return f"needs a CUDA device, and torch {torch.__version__} sees none"
    return None
